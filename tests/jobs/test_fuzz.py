"""Whatever a job file or a run's metadata hold: a sentence, or the thing itself; no other error, no file elsewhere.

INTERP_FUZZ=3000 tries 12,000 inputs of the parser and of the decoder, and 1,000 of the reader, in each test instead of
240 and 20.
"""

import json
import os
import shutil

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from interp.errors import InterpError
from interp.jobs import Job, read_job
from interp.jobs.spec import parse_job
from interp.jobs.yaml_file import parse_yaml
from interp.stores import Run, StoreError, open_run, verify
from interp.stores.codec import ChecksumError, checksummed, decoded, encode
from interp.stores.testing import small_layout, write_sample

COUNT = int(os.environ.get("INTERP_FUZZ", "60"))
options = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None, "phases": [Phase.generate]}
fuzz = settings(max_examples=COUNT * 4, **options)
fuzz_reader = settings(max_examples=max(1, COUNT // 3), **options)  # each opens and verifies a run

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12),
    st.sampled_from(["../x", "/etc/passwd", "~/x", "a/../../b", "x.csv", "evil.py", "0-9999999999", "auto", "\0", "link/x"]),
)  # fmt: skip
values = st.recursive(
    scalars, lambda v: st.one_of(st.lists(v, max_size=4), st.dictionaries(st.text(max_size=6), v, max_size=4)),
    max_leaves=12,
)  # fmt: skip
sound = {
    "model": st.just("scenes"), "prompts": st.lists(st.text(), min_size=1, max_size=3), "store": st.just("r.zarr"),
    "seeds": st.integers(0, 9), "steps": st.integers(1, 9),
}  # fmt: skip
jobs = st.builds(
    lambda good, bad: {**good, **bad},
    st.fixed_dictionaries({}, optional=sound),
    st.dictionaries(st.one_of(st.sampled_from(list(Job.model_fields)), st.text(max_size=8)), values, max_size=3),
)


def one_sentence(error):
    text = str(error)
    assert text and "\n" not in text and "Traceback" not in text
    return True


@fuzz
@given(values=jobs)
def test_any_mapping_is_a_job_or_a_sentence(values):
    try:
        job = parse_job(values)
    except InterpError as error:
        assert one_sentence(error)
        return
    assert isinstance(job, Job)
    there = Job.model_validate(job.model_dump(mode="json"), strict=False)  # what workers get
    assert repr(there) == repr(job)  # NaN is not equal to itself


@fuzz
@given(text=st.one_of(
    st.text(alphabet="abc:-[]{}&*!|>'\"#%@ \n\t0123.~,?<", max_size=80),
    jobs.map(lambda v: yaml.safe_dump(v, allow_unicode=True)),
    st.text(max_size=60),
))  # fmt: skip
def test_any_text_is_plain_values_or_a_sentence(text):
    try:
        found = parse_yaml(text)
    except InterpError as error:
        assert one_sentence(error)
        return
    assert isinstance(found, dict)


@fuzz
@given(values=jobs, data=st.binary(max_size=40))
def test_any_file_is_read_without_leaving_its_folder(tmp_path_factory, values, data):
    folder = tmp_path_factory.getbasetemp() / "fuzz" / "job"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "link").is_symlink():
        (folder / "link").symlink_to(folder.parent)
    (folder / "job.yaml").write_bytes(yaml.safe_dump(values, allow_unicode=True).encode() + data)
    try:
        job = read_job(folder / "job.yaml")
    except InterpError as error:
        assert one_sentence(error)
        return
    assert folder.resolve() in job.path.resolve().parents


# The reader


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    from interp.stores import create_run

    path = tmp_path_factory.mktemp("fuzz") / "run.zarr"
    with create_run(path, small_layout(n=2, steps=2)) as writer:
        for i in range(2):
            write_sample(writer, i)
    return path


@pytest.fixture(scope="module")
def other(whole):
    """A copy to be damaged, one file at a time; each is mended before the next."""
    return shutil.copytree(whole, whole.with_name("damaged.zarr"))


def paths(document, at=()):
    """Every place in a JSON document."""
    yield at
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in items:
        yield from paths(value, (*at, key))


leaves = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 5), st.integers(2**31, 2**62), st.floats(), st.text(max_size=8),
    st.sampled_from(["../x", "a/../b", "NaN", "string", "float32", "gzip", "zstd", "bytes", "vlen-utf8", {}, []]),
)  # fmt: skip


@fuzz_reader
@given(data=st.data())
def test_any_metadata_open_or_are_refused(whole, other, data):
    document = json.loads((whole / "zarr.json").read_text())
    places = [p for p in paths(document) if p]
    for _ in range(data.draw(st.integers(1, 3))):
        *parents, last = data.draw(st.sampled_from(places))
        node = document
        try:
            for key in parents:
                node = node[key]
            action = data.draw(st.sampled_from(["set", "delete", "rename"]))
            if action == "set":
                node[last] = data.draw(leaves)
            elif action == "delete":
                del node[last]
            elif isinstance(node, dict):
                node[data.draw(st.sampled_from(["../x", "/etc/x", "x", ".hidden", "a//b"]))] = node.pop(last)
        except (KeyError, IndexError, TypeError):
            continue
    (other / "zarr.json").write_text(json.dumps(document))
    try:
        run = open_run(other)
        assert isinstance(run, Run)
        assert all(isinstance(p, str) for p in verify(run))
    except StoreError as error:
        assert str(error)
    finally:
        shutil.copyfile(whole / "zarr.json", other / "zarr.json")


@fuzz_reader
@given(data=st.data())
def test_any_bytes_in_a_chunk_are_found_or_the_same(other, data):
    files = sorted(p for p in other.rglob("c/**/*") if p.is_file() and "status" not in str(p))
    file = data.draw(st.sampled_from(files))
    before = file.read_bytes()
    after = data.draw(st.one_of(st.binary(max_size=64), st.integers(0, len(before)).map(lambda n: before[:n])))
    file.write_bytes(after)
    try:
        problems = verify(open_run(other))
    except StoreError:
        return
    finally:
        file.write_bytes(before)
    assert problems or after == before


KINDS = [("float32", (2, 3)), ("float16", (7,)), ("int8", (4,)), ("uint64", (1, 2)), ("str", (5,))]
small = st.binary(max_size=80)
numbers = st.integers(0, 2**32 - 1).map(lambda n: n.to_bytes(4, "little")) | st.integers(0, 64).map(
    lambda n: n.to_bytes(4, "little")
)


@fuzz
@given(
    kind=st.sampled_from(KINDS),
    compress=st.booleans(),
    cut=st.integers(0, 60),
    put=small,
    size=numbers,
    sound=st.booleans(),
)
def test_any_body_with_a_right_checksum_is_values_or_damage(kind, compress, cut, put, size, sound):
    """Past the checksum: a sound chunk that is cut, goes on in other bytes, and claims another size."""
    dtype, shape = kind
    values = np.array(["é" * k for k in range(shape[0])], object) if dtype == "str" else np.ones(shape, dtype)
    body = encode(values, compress=compress)[:-4]
    body = body[:cut] + put
    if sound:
        body = body[:4] + size + body[8:] if compress else size + body[4:]
    try:
        found = decoded(checksummed(body), dtype, shape, compress=compress)
    except ChecksumError as error:
        assert one_sentence(error)
        return
    assert found.shape == shape and found.dtype == values.dtype
