"""The report of `fastgen info`."""

from __future__ import annotations

import json
import subprocess
import sys

import torch

import fastgen
from fastgen import backends, info


def test_collect_is_plain_data_with_the_facts():
    facts = json.loads(json.dumps(info.collect()))
    assert facts["fastgen"]["version"] == fastgen.__version__
    assert facts["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert facts["threads"]["intra-op"] == torch.get_num_threads()
    assert facts["processor"]["usable cores"] >= 1
    assert facts["cpu"]["loaded"] == "yes"
    assert facts["cpu"]["chosen"] in facts["cpu"]["instruction sets"]
    assert facts["cuda"]["loaded"].startswith(("yes", "no: "))
    assert "masked_conv2d" in facts["backends"]["reference"].split()
    assert set(facts["backends"]) == set(facts["sampler"]) == set(backends.BACKENDS)
    assert all("sample_plan" in facts["backends"][name].split() for name in ("reference", "cpu"))
    assert facts["sampler"]["reference"] == facts["sampler"]["cpu"] == "yes"
    assert facts["sampler"]["cuda"].startswith("no: ")


def test_executors_without_a_gpu_say_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(backends, "unavailable", lambda name: "it is broken" if name == "triton" else None)
    sampler = info.collect()["sampler"]
    assert sampler == {"cuda": "no: torch sees no GPU", "triton": "no: it is broken", "cpu": "yes", "reference": "yes"}


def test_fastgen_brings_no_second_openmp_runtime():
    code = (
        "import torch; from fastgen import backends, info; before = info.openmp_runtimes()\n"
        "backends.native_cpu(); print(before == info.openmp_runtimes(), *before)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.startswith("True"), out


def test_environment_is_explained(monkeypatch):
    monkeypatch.setenv("FASTGEN_BACKEND", "cpu")
    monkeypatch.setenv("OMP_DYNAMIC", "true")
    environment = info.collect()["environment"]
    assert environment["FASTGEN_BACKEND"]["value"] == "cpu"
    assert environment["OMP_DYNAMIC"] == {"value": "true", "meaning": "not read by fastgen"}
    assert environment["FASTGEN_ISA"]["meaning"]


def test_modules_that_do_not_load_say_why(monkeypatch):
    monkeypatch.setattr(backends, "import_error", lambda module: f"fastgen.{module} is broken")
    facts = info.collect()
    assert facts["cpu"] == {"loaded": "no: fastgen._cpu is broken"}
    assert facts["cuda"] == {"loaded": "no: fastgen._cuda is broken"}


def test_render_has_a_line_per_fact():
    facts = info.collect()
    lines = info.render(facts).splitlines()
    assert set(facts) <= set(lines)  # the headings
    assert any(line.split() == ["version", fastgen.__version__] for line in lines)
    assert sum("FASTGEN_ISA " in line for line in lines) == 1
    assert info.render({"group": {"a": None, "b": [], "c": [1, 2]}, "empty": []}) == (
        "group\n  a  none\n  b  none\n  c  1 2\nempty\n  none"
    )
