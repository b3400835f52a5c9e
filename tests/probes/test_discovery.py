import os
import pickle
import subprocess
import sys
from contextlib import nullcontext

import pytest

from interp.probes import find_probe, list_probes, plot
from interp.probes.discovery import find_plugin, load_file, load_plugins, plugins
from interp.stores import InterpError, synthetic_run
from tests.probes.conftest import write_dist_info

EIGHT_LINES = '''from interp.probes import probe

@probe("sharpness")
def sharpness(run, *, power: float = 2.0):
    """Mean difference of neighbouring latents, to the `power` (latent units to that power)."""
    z = run.latents
    edges = abs(z.diff("x")) ** power
    return edges.mean(["channel", "y", "x"]).assign_attrs(units="latent units^power")
'''


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on sys.path with an installed distribution of good and broken probes."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "their_probes.py").write_text(EIGHT_LINES + "\nnumber = 3\n")
    (tmp_path / "their_broken.py").write_text("raise RuntimeError('no such device')\n")
    entries = {
        "sharpness": "their_probes:sharpness",
        "broken": "their_broken:thing",
        "gone": "no_such_module_at_all:thing",
        "number": "their_probes:number",
        "misnamed": "their_probes:sharpness",
    }
    write_dist_info(tmp_path, "their-probes", "interp.probes", entries)
    yield tmp_path
    for name in ("their_probes", "their_broken"):
        sys.modules.pop(name, None)


def test_built_in_probes_are_plugins_like_any(built_in_probes):
    assert {"frequency_energy", "token_attribution", "attention_mass", "eos_replacement"} <= set(built_in_probes)
    for name in built_in_probes:
        assert find_probe(name).name == name and find_probe(name).summary


def test_listing_imports_nothing(site):
    code = (
        "import sys; from interp.probes import list_probes; infos = list_probes(); "
        "assert 'their_probes' not in sys.modules and 'interp.probes.eos' not in sys.modules; "
        "print(*[f'{i.name}|{i.summary}|{i.source}' for i in infos], sep='\\n')"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    lines = dict(line.split("|", 1) for line in out.stdout.splitlines())
    assert lines["sharpness"].startswith("Mean difference of neighbouring latents")
    assert lines["sharpness"].endswith("their_probes:sharpness of their-probes")
    assert lines["frequency_energy"].startswith("Low- and high-frequency norms")
    assert lines["broken"].startswith("|") and lines["gone"].startswith("|")


def test_summaries_listed_are_the_probes_own():
    for info in list_probes():
        assert info.summary == find_probe(info.name).summary


def test_an_installed_probe_is_found_and_asked(site):
    ds = synthetic_run().probe("sharpness", power=1)
    assert ds["sharpness"].dims == ("sample", "step")


def test_broken_plugins_are_named_and_take_nobody_down(site):
    with pytest.warns(RuntimeWarning) as caught:
        loaded = load_plugins("interp.probes")
    assert {"sharpness", "frequency_energy"} <= set(loaded) and not {"broken", "gone"} & set(loaded)
    texts = [str(w.message) for w in caught]
    assert any("'broken' (their_broken:thing) of their-probes" in t and "no such device" in t for t in texts)
    assert any("'gone'" in t and "no_such_module_at_all" in t for t in texts)
    assert find_probe("sharpness").name == "sharpness"
    with pytest.raises(InterpError, match=r"plugin 'broken' .* of their-probes cannot be loaded: RuntimeError"):
        find_probe("broken")


GOOD = {
    "interp.probes": "guidance_norm",
    "interp.metrics": "l1",
    "interp.interventions": "remove_text",
    "interp.families": "unet",
}


@pytest.mark.parametrize("group", GOOD)
def test_broken_plugins_of_every_kind(group, tmp_path, monkeypatch):
    """Each is named in a sentence where it is asked for, is a warning where all are loaded, and stops nobody else."""
    from interp.families import families, find_family
    from interp.interventions import from_spec
    from interp.scoring import find_metric, list_metrics
    from tests.families.pipelines import tiny

    find = {
        "interp.probes": find_probe,
        "interp.metrics": find_metric,
        "interp.interventions": lambda name: from_spec({"name": name}),
        "interp.families": lambda name: families()[name],
    }[group]
    bad = {"raises": "raise RuntimeError('no device')", "syntax": "def", "exits": "import sys; sys.exit(3)"}
    wrong = {"a_class": "class a_class:\n    pass", "a_number": "a_number = 3"}
    monkeypatch.syspath_prepend(tmp_path)
    for name, code in (bad | wrong).items():
        (tmp_path / f"bad_{name}.py").write_text(code + "\n")
    entries = {name: f"bad_{name}:{name}" for name in bad | wrong} | {"absent": "no_such_module_at_all:x"}
    write_dist_info(tmp_path, "bad-plugins", group, entries)
    for name in entries:
        with (
            pytest.warns(RuntimeWarning) if group == "interp.families" else nullcontext(),
            pytest.raises(KeyError if group == "interp.families" else InterpError, match=f"'{name}'"),
        ):
            find(name)
    if group == "interp.families":
        with pytest.warns(RuntimeWarning) as caught:
            found = find_family(tiny("sd1"))
        texts = [str(w.message) for w in caught]
        assert all(any(f"'{n}'" in t and "bad-plugins" in t and "left out" in t for t in texts) for n in entries)
        assert found.name == "unet"
    else:
        assert find(GOOD[group])
    listed = {"interp.probes": list_probes, "interp.metrics": list_metrics}.get(group, lambda: [])()
    assert not listed or {*entries, GOOD[group]} <= {info.name for info in listed}


def test_a_family_that_cannot_tell_is_a_warning():
    from interp.families import find_family, trying
    from interp.families.unet import UNetFamily
    from tests.families.pipelines import tiny

    class Confused(UNetFamily):
        @classmethod
        def matches(cls, pipe):
            return pipe.no_such_part

    with trying(Confused), pytest.warns(UserWarning, match="family Confused of .* failed to tell whether it describes"):
        assert type(find_family(tiny("sd1"))) is UNetFamily


def test_wrong_plugins_are_sentences(site):
    with pytest.raises(InterpError, match="plugin 'number' is an object of type int, not a probe"):
        find_probe("number")
    with pytest.raises(InterpError, match="plugin 'misnamed' is a probe called 'sharpness'"):
        find_probe("misnamed")
    with pytest.raises(
        InterpError, match=r"no probe named 'frequency_enery'; installed: .*; did you mean 'frequency_energy'"
    ):
        find_probe("frequency_enery")


def test_one_name_twice_is_an_error_that_names_both(site, tmp_path):
    write_dist_info(tmp_path, "other-probes", "interp.probes", {"sharpness": "other:thing"})
    with pytest.raises(InterpError, match=r"two plugins are called 'sharpness': .*other.*their-probes"):
        find_probe("sharpness")
    write_dist_info(tmp_path, "third-probes", "interp.probes", {"frequency_energy": "their_probes:sharpness"})
    with pytest.warns(RuntimeWarning) as caught:
        loaded = load_plugins("interp.probes")
    twice = [str(w.message) for w in caught if "two plugins are called 'sharpness'" in str(w.message)]
    assert len(twice) == 2 and all(text.endswith("it is left out") for text in twice)
    assert "sharpness" not in loaded and loaded["frequency_energy"].name == "frequency_energy"  # ours stays
    assert find_probe("attention_mass") and len(list_probes()) > 4


def test_the_same_distribution_found_twice_is_one(site, monkeypatch):
    monkeypatch.syspath_prepend(site)
    assert [p.name for p in plugins("interp.probes")].count("sharpness") == 1


def test_any_group_is_served(site, tmp_path):
    write_dist_info(tmp_path, "a-family", "some.families", {"tiny": "their_probes:number"})
    assert find_plugin("tiny", "some.families") == 3
    assert load_plugins("some.families") == {"tiny": 3} and load_plugins("no.such.group") == {}
    with pytest.raises(InterpError, match="no family named 'tny'; installed: tiny; did you mean 'tiny'"):
        find_plugin("tny", "some.families")
    with pytest.raises(InterpError, match="none is installed"):
        find_plugin("x", "no.such.group")


def test_a_plain_file_of_eight_lines(tmp_path, monkeypatch):
    (tmp_path / "sharpness.py").write_text(EIGHT_LINES)
    run = synthetic_run()
    found = find_probe(tmp_path / "sharpness.py")
    ds = found(run)
    assert ds.identical(run.probe(f"{tmp_path}/sharpness.py:sharpness"))
    assert pickle.loads(pickle.dumps(found)) is found  # noqa: S301
    assert plot(ds).axes[0].get_ylabel() == "sharpness (latent units^power)"
    monkeypatch.chdir(tmp_path)
    assert find_probe("sharpness.py") is found and "sharpness" not in sys.modules


def test_a_probe_of_a_file_is_pickled_to_another_process(tmp_path):
    (tmp_path / "sharpness.py").write_text(EIGHT_LINES)
    data = pickle.dumps(find_probe(f"{tmp_path}/sharpness.py"))
    code = f"import pickle; print(pickle.loads({data!r}).name)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "sharpness"


def test_an_edited_file_is_read_again(tmp_path):
    file = tmp_path / "p.py"
    file.write_text(EIGHT_LINES)
    first = find_probe(str(file))
    file.write_text(EIGHT_LINES.replace("2.0", "3.25"))
    assert find_probe(str(file)).params["power"].default == 3.25 and first.params["power"].default == 2.0


def test_files_that_are_no_use_are_sentences(tmp_path):
    (tmp_path / "two.py").write_text(EIGHT_LINES + EIGHT_LINES.replace("sharpness", "other"))
    (tmp_path / "none.py").write_text("from interp.probes.frequency import frequency_energy\n")
    (tmp_path / "bad.py").write_text("import no_such_module_at_all\n")
    (tmp_path / "syntax.py").write_text("def\n")
    (tmp_path / "exits.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "class.py").write_text("class Probe:\n    pass\n")
    for name, text in (
        ("two.py", "several probes: ask for one of .*two.py:sharpness, .*two.py:other"),
        (
            "two.py:sharpnes",
            "no probe named 'sharpnes'; it has .*; did you mean 'sharpness'",
        ),
        ("none.py", 'has no probe: write @probe\\("none"\\)'),
        ("bad.py", "cannot be loaded: ModuleNotFoundError"),
        ("syntax.py", "cannot be loaded: SyntaxError"),
        ("exits.py", "cannot be loaded: SystemExit: 3"),
        ("class.py", "has no probe: write @probe"),
        ("absent.py", "no such file"),
    ):
        with pytest.raises(InterpError, match=text):
            find_probe(f"{tmp_path}/{name}")
    assert find_probe(f"{tmp_path}/two.py:other").name == "other"
    assert not [m for m in sys.modules if m.startswith("_interp_file_bad")]
    assert load_file(tmp_path / "two.py") is load_file(tmp_path / "two.py")
