"""XPK's JobSets of scripts/launch/gke against the Kubernetes API; run by scripts/launch/validate."""

import argparse
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any

import jsonschema
import yaml
from kubernetes import client
from xpk.parser.core import set_parser

HERE = pathlib.Path(__file__).parent
sys.path.append(str(HERE.parents[1] / "tests"))
from pages import all_commands  # noqa: E402

# Topology, slices; hosts of a slice, and what GKE's nodes are labelled with.
CASES = [
    ("v5p:4x4x4", 1, 16, "tpu-v5p-slice"),
    ("v5p:4x4x4", 2, 16, "tpu-v5p-slice"),
    ("v5e:4x4", 1, 4, "tpu-v5-lite-podslice"),
    ("v6e:16x16", 4, 64, "tpu-v6e-slice"),
    ("tpu7x:2x2x2", 1, 2, "tpu7x"),
]
RESTARTS, MISTAKE = (1, 143), 2


def main() -> None:
    """Check all cases; a line each."""
    schema = _schema(pathlib.Path(sys.argv[1])) if len(sys.argv) > 1 else None
    for topology, slices, hosts, accelerator in CASES:
        jobset = _jobset(topology, slices)
        _check(jobset, topology, slices, hosts, accelerator)
        if schema is not None:
            _must_fit(jobset, schema)
        print(f"gke: {topology}, {slices} slices: a valid JobSet of {slices * hosts} pods")
    parser = argparse.ArgumentParser("xpk")
    set_parser(parser)
    for words, where in all_commands():
        if words[0] == "xpk":
            # Some dry runs ask the cluster.
            parser.parse_args(words[1:])
            print(f"{where}: {' '.join(words[:3])}: taken by xpk")


def _jobset(topology: str, slices: int) -> dict[str, Any]:
    """What XPK would give to the cluster."""
    with tempfile.TemporaryDirectory() as folder:
        manifest = pathlib.Path(folder, "jobset.yaml")
        words = f"--cluster c --topology {topology} --slices {slices} --image an-image --name a-run".split()
        words += ["--project=p", "--zone=us-east5-a", "--spot", "--dry-run", "--skip-validation", "--quiet"]
        words += [f"--output-manifest-file={manifest}", "--", "quickstart", "--runs-dir", "gs://bucket/runs"]
        words += ["--evaluation.sample-prompt", 'It\'s a "truth" & more']
        done = subprocess.run(
            [HERE / "gke", *words], capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        if done.returncode or not manifest.exists():
            sys.exit(f"xpk fails for {topology}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
        return yaml.safe_load(manifest.read_text())


def _check(jobset: dict[str, Any], topology: str, slices: int, hosts: int, accelerator: str) -> None:
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    _must_be_of("V1ObjectMeta", jobset["metadata"], "metadata")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    _must_be_of("V1JobTemplateSpec", replicated["template"], "template")
    job = replicated["template"]["spec"]
    assert (replicated["replicas"], job["parallelism"], job["completions"]) == (slices, hosts, hosts), (
        replicated
    )
    pod = job["template"]["spec"]
    selector = pod["nodeSelector"]
    assert selector["cloud.google.com/gke-tpu-accelerator"] == accelerator, selector
    assert selector["cloud.google.com/gke-tpu-topology"] == topology.partition(":")[2], selector
    (rule,) = job["podFailurePolicy"]["rules"]
    stays_failed = rule["onExitCodes"]
    assert (rule["action"], stays_failed["operator"]) == ("FailJob", "NotIn"), rule
    assert set(RESTARTS) <= set(stays_failed["values"]), "a preempted run would not be started again"
    assert MISTAKE not in stays_failed["values"], "a mistake of the user would be started again and again"
    (container,) = pod["containers"]
    script = container["command"][-1]
    assert "exec scripts/launch/resumable mc-jax train quickstart --runs-dir gs://bucket/runs" in script, (
        script
    )
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def _must_be_of(kind: str, value: Any, where: str) -> None:
    """See that a value has the fields, and their types, of a type of the Kubernetes client."""
    if value is None:  # XPK writes empty blocks
        return
    if inner := re.fullmatch(r"list\[(.*)\]", kind):
        assert isinstance(value, list), f"{where} is no list"
        for index, element in enumerate(value):
            _must_be_of(inner[1], element, f"{where}[{index}]")
    elif inner := re.fullmatch(r"dict\((.*), (.*)\)", kind):
        for name, element in value.items():
            is_quantity = where.endswith((".limits", ".requests")) and isinstance(element, int)
            _must_be_of("int" if is_quantity else inner[2], element, f"{where}.{name}")
    elif kind in ("str", "int", "bool", "float"):
        assert type(value).__name__ == kind, f"{where} is {value!r}, not {kind}"
    elif kind != "object":
        model = getattr(client, kind)
        types = {model.attribute_map[name]: of for name, of in model.openapi_types.items()}
        for name, element in value.items():
            assert name in types, f"{where} has no field {name}"
            _must_be_of(types[name], element, f"{where}.{name}")


def _must_fit(jobset: dict[str, Any], schema: dict[str, Any]) -> None:
    for index, rule in enumerate(jobset["spec"]["failurePolicy"]["rules"]):
        rule.setdefault("name", f"failurePolicyRule{index}")  # as JobSet's webhook does before the check
    errors = [
        f"{error.json_path}: {error.message}"
        for error in jsonschema.Draft7Validator(schema).iter_errors(jobset)
    ]
    assert not errors, "\n".join(errors)


def _schema(file: pathlib.Path) -> dict[str, Any]:
    """The JSON schema in a CustomResourceDefinition, with unknown fields forbidden."""
    versions = yaml.safe_load(file.read_text())["spec"]["versions"]
    (schema,) = (
        version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1alpha2"
    )
    return _strict(schema, is_root=True)


def _strict(node: Any, *, is_root: bool = False) -> Any:
    if isinstance(node, list):
        return [_strict(element) for element in node]
    if not isinstance(node, dict):
        return node
    node = {name: _strict(element) for name, element in node.items()}
    # The root's metadata is any object's; its fields are not listed.
    if isinstance(node.get("properties"), dict) and node.get("type") == "object":
        if is_root:
            node["properties"]["metadata"] = {"type": "object"}
        node.setdefault("additionalProperties", False)
    if node.pop("x-kubernetes-int-or-string", False):
        node = {"type": ["integer", "string"]}
    # Kubernetes takes a missing value for null.
    if isinstance(node.get("type"), str) and not is_root:
        node["type"] = [node["type"], "null"]
    return node


if __name__ == "__main__":
    main()
