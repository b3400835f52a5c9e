"""The same run from a folder, a .zip file and an S3 server says the same."""

import shutil
import socket
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest

from interp.stores import StoreError, open_run, synthetic_run, verify

BUCKET = "runs"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("places") / "run.zarr"
    synthetic_run(samples=2, conditions=("baseline", "late"), path=path)
    return path


@pytest.fixture(scope="module")
def zipped(folder):
    return shutil.make_archive(str(folder), "zip", folder)


@pytest.fixture(scope="module")
def server(folder):
    """A moto server with the run in it, as `s3://runs/a/run.zarr`."""
    pytest.importorskip("obstore")
    pytest.importorskip("moto.server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    moto = subprocess.Popen(
        [sys.executable, "-c", f"from moto.server import main; main(['-p', '{port}'])"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    settings = {
        "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        try:
            _upload(port, folder)
            yield
        finally:
            moto.kill()
            moto.wait()


def _upload(port, folder):
    import urllib.request

    import obstore

    until = time.monotonic() + 30
    while True:
        try:
            make = urllib.request.Request(f"http://127.0.0.1:{port}/{BUCKET}", method="PUT", headers={
                "Authorization": "AWS4-HMAC-SHA256 Credential=test/20200101/us-east-1/s3/aws4_request"})  # fmt: skip
            urllib.request.urlopen(make, timeout=5).close()
            break
        except OSError:
            assert time.monotonic() < until, "the moto server does not answer"
            time.sleep(0.1)
    store = obstore.store.from_url(f"s3://{BUCKET}/a/run.zarr", client_options={"allow_http": True})
    for file in folder.rglob("*"):
        if file.is_file():
            obstore.put(store, str(file.relative_to(folder)), file.read_bytes())


def same(run, other):
    assert run.samples.equals(other.samples)
    for node in run.tree.subtree:
        for name, array in node.to_dataset(inherit=False).variables.items():
            np.testing.assert_array_equal(array.values, other.tree[node.path].to_dataset(inherit=False)[name].values)
    assert verify(other) == []
    late = other.sel(condition="late", prompt_id=1)
    assert late.latents.values.tobytes() == run.sel(condition="late", prompt_id=1).latents.values.tobytes()
    first = run.probe("frequency_energy")["x_norm"].values
    np.testing.assert_array_equal(other.probe("frequency_energy")["x_norm"].values, first)


def test_a_zip_file_is_a_run(folder, zipped):
    same(open_run(folder), open_run(zipped))
    assert zipped in repr(open_run(zipped))


def test_an_s3_address_is_a_run(folder, server):
    same(open_run(folder), open_run(f"s3://{BUCKET}/a/run.zarr"))
    same(open_run(folder), open_run(f"s3://{BUCKET}/a/run.zarr/"))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: p.write_bytes(b"PK nonsense"), "could not be read as a .zip file"),
        (lambda p: zipfile.ZipFile(p, "w").close(), "has no zarr.json at its top"),
        (lambda p: _zip(p, {"zarr.json": "{"}), "cannot be read, so this is not a run"),
        (lambda p: _zip(p, {"zarr.json": "{}"}), "is a Zarr store, but not a run"),
        (lambda p: _zip(p, {"zarr.json": '{"attributes": {"format": "interp.run/9"}}'}), "is of format interp.run/9"),
        (lambda p: _zip(p, {"zarr.json": '{"attributes": {"format": "interp.run/1"}}'}), "no consolidated metadata"),
        (lambda p: None, "there is no run at"),
    ],
)
def test_other_zip_files_are_refused_in_a_sentence(tmp_path, make, says):
    make(tmp_path / "x.zip")
    with pytest.raises(StoreError, match=says) as caught:
        open_run(tmp_path / "x.zip")
    assert "\n" not in str(caught.value)


def _zip(path, members):
    with zipfile.ZipFile(path, "w") as file:
        for name, text in members.items():
            file.writestr(name, text)


def test_what_is_not_there_is_said(server):
    with pytest.raises(StoreError, match="there is no run at s3://runs/none"):
        open_run(f"s3://{BUCKET}/none")
    with pytest.raises(StoreError, match="cannot read from 'ftp:"):
        open_run("ftp://x/run.zarr")


def test_scores_need_a_folder(zipped, server):
    for place in (zipped, f"s3://{BUCKET}/a/run.zarr"):
        with pytest.raises(StoreError, match="copy the run to a local folder first"):
            open_run(place).write_scores({"clip:prompt": np.zeros(4)})
