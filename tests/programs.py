"""What compiling for TPUs that are not here showed, on record, so that no program is compiled twice.

What is lowered depends on the code alone, and what is compiled on that, the compiler and its options: so a
program whose hash is on record compiles, and has these kernels and this memory. `scripts/record_programs`
writes the record, `scripts/test --all` compiles everything whatever the record says.
"""

import dataclasses
import fcntl
import hashlib
import importlib.metadata
import inspect
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
from jax._src import cache_key  # what JAX itself finds compiled programs again by
from tpu_topology import lower_for

RECORD = Path(__file__).with_name("programs.json")
MOST_UNRECORDED = 12
"""Programs that a run of all tests may compile: more take minutes that nobody would notice."""
_KERNEL = re.compile(r'%?([\w.\-]+) = [^\n]*custom_call_target="tpu_custom_call"')
_MEMORY = ("argument", "output", "alias", "temp", "host_temp")


def fingerprint(lowered: jax.stages.Lowered, *more: str) -> str:
    """A hash of a lowered program without its source locations, of where it would run, and its compiler.

    Args:
      lowered: for TPUs.
      *more: what else the facts depend on.
    """
    program = lowered._lowering
    devices = [
        (device.device_kind, device.coords, getattr(device, "slice_index", 0))
        for device in program._device_list
    ]
    options = sorted(map(str, program._compiler_options_kvs))
    found = hashlib.sha256(cache_key._canonicalize_ir(program.stablehlo(), False))
    for part in (*_versions(), devices, options, jax.config.jax_optimization_level, *more):
        found.update(f"\0{part}".encode())
    return found.hexdigest()[:20]


def _versions() -> list[str]:
    return [importlib.metadata.version(name) for name in ("jaxlib", "libtpu")]


def source(*parts: ModuleType | Callable) -> str:
    """The text of what reads facts off compiled programs: another text may read otherwise."""
    return "\0".join(inspect.getsource(part) for part in parts)


def what_compiling_shows(compiled: jax.stages.Compiled) -> dict[str, Any]:
    """Kernels by name, and bytes on one chip."""
    from mc_jax.planning.cost import kernel_name  # it imports much, and few tests come here

    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None
    assert memory is not None
    kernels = Counter(kernel_name(operation) for operation in _KERNEL.findall(text))
    return {
        "kernels": dict(sorted(kernels.items())),
        "bytes": {name: getattr(memory, f"{name}_size_in_bytes") for name in _MEMORY},
    }


@dataclasses.dataclass
class Programs:
    """The programs that a test compiles, or finds on record."""

    test: str
    """Its name, which the record has for whoever reads it."""
    mode: str | None
    """"record": write what is found; "check": fail where the record lacks one; "all": compile everything."""
    seen: dict[str, bool]
    """Of each of the session's programs, by name, whether it was on record."""
    count: int = 0

    def knows(self, key: str) -> bool:
        """Whether the program with a fingerprint need not be compiled."""
        known = key in by_fingerprint()
        assert known or self.mode != "check", f"{self.test}: not on record; run scripts/record_programs"
        return known and self.mode != "all"

    def compiled(
        self,
        lowered: jax.stages.Lowered,
        find: Callable[[], Any] | None = None,
        by: Iterable[ModuleType] = (),
    ) -> Any:
        """Return what compiling a program shows, from the record if it has it.

        Args:
          lowered: for TPUs.
          find: compiles it and returns facts for JSON; by default `what_compiling_shows`.
          by: modules that read these facts off the compiled program.
        """
        key = fingerprint(lowered, *([] if find is None else [source(*by, find)]))
        self.count += 1
        name = self.test if self.count == 1 else f"{self.test} {self.count}"
        return self.facts(name, key, find or (lambda: what_compiling_shows(lowered.compile())))

    def compiled_for(self, chip: str, function: Callable, *shapes, donate_argnums=()) -> Any:
        """`compiled` of what `lower_for` lowers."""
        return self.compiled(lower_for(chip, function, *shapes, donate_argnums=donate_argnums))

    def facts(self, name: str, key: str, find: Callable[[], Any]) -> Any:
        """Return the facts of the program with a fingerprint, from the record if it has it."""
        record = by_fingerprint()
        self.seen[name] = key in record
        found = record[key] if self.knows(key) else json.loads(json.dumps(find()))
        if key in record:
            assert found == record[key], f"the record says otherwise of {name}: why? Its line has to go"
        if self.mode == "record":
            write_record({name: {"program": key, "facts": found}})
        return found


def by_fingerprint() -> dict[str, Any]:
    """What is on record of each program."""
    with RECORD.open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # another worker may be writing
        return {entry["program"]: entry["facts"] for entry in json.load(file).values()}


def write_record(entries: dict[str, Any], only: Iterable[str] | None = None) -> None:
    """Put entries into the record, a line each; of others keep those named by `only`, or all."""
    with RECORD.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        entries = json.loads(file.read() or "{}") | entries
        kept = sorted(entries if only is None else entries.keys() & {*only})
        lines = [f"{json.dumps(name)}: {json.dumps(entries[name], sort_keys=True)}" for name in kept]
        file.seek(0)
        file.truncate()
        file.write("{\n" + ",\n".join(lines) + "\n}\n")
