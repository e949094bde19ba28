"""Checks the wheel that is handed out: python tests/guards/check_wheel.py dist/fastattn-*.whl [build]

One file has to load into every Python from 3.10 on and every torch from 2.11 on, with CUDA or without. So: nothing of
Python in it, of torch only the stable ABI's symbols that 2.11 has (torch_symbols.txt), no library but libtorch and the
C and C++ runtimes, and a size people can download. With the build folder as second argument, the objects compiled for
one instruction set are checked too: a function that another object could share would be executed on processors without
that instruction set.
"""

import re
import sys
import zipfile
from io import BytesIO
from pathlib import Path

from elftools.elf.elffile import ELFFile

WHEEL_NAME = re.compile(r"fastattn-[^-]+-py3-none-manylinux_2_(2[0-9]|3[0-4])_x86_64\.whl")
WHEEL_BUDGET = 40 << 20
LIBRARIES = {"libtorch.so", "libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6", "ld-linux-x86-64.so.2"}
WEAK = {
    "aoti_torch_get_current_cuda_stream",
    "__cxa_finalize",
    "__gmon_start__",
    "_ITM_deregisterTMCloneTable",
    "_ITM_registerTMCloneTable",
}
EXPORTS = re.compile(r"fastattn_\w+")
TORCH_SYMBOLS = set(Path(__file__).with_name("torch_symbols.txt").read_text().split())


def wheel_complaints(wheel: Path) -> list[str]:
    complaints = []
    if not WHEEL_NAME.fullmatch(wheel.name):
        complaints.append(f"its name is {wheel.name}, not one of the form {WHEEL_NAME.pattern}")
    if wheel.stat().st_size > WHEEL_BUDGET:
        complaints.append(f"it has {wheel.stat().st_size} bytes, {WHEEL_BUDGET} are allowed")
    with zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if ".so" in Path(name).suffixes]
        if libraries != ["fastattn/fastattn_torch.so"]:
            return [*complaints, f"its libraries are {libraries}, not fastattn/fastattn_torch.so alone"]
        return complaints + library_complaints(archive.read(libraries[0]))


def library_complaints(library: bytes) -> list[str]:
    elf = ELFFile(BytesIO(library))
    dynamic = elf.get_section_by_name(".dynamic")
    symbols = elf.get_section_by_name(".dynsym")
    versions = elf.get_section_by_name(".gnu.version")
    complaints = []

    needed = {tag.needed for tag in dynamic.iter_tags("DT_NEEDED")}
    if "libtorch.so" not in needed:
        complaints.append("it does not name libtorch.so as needed, so torch's symbols will not be found")
    complaints += [f"it needs {name}" for name in sorted(needed - LIBRARIES)]
    complaints += [f"it has a {tag}" for tag in ("DT_RPATH", "DT_RUNPATH") if any(dynamic.iter_tags(tag))]

    for index, symbol in enumerate(symbols.iter_symbols()):
        name = symbol.name
        if not name:
            continue
        if symbol["st_shndx"] != "SHN_UNDEF":
            if symbol["st_info"]["bind"] == "STB_GLOBAL" and not EXPORTS.fullmatch(name):
                complaints.append(f"it exports {name}")
            continue
        versioned = isinstance(versions.get_symbol(index)["ndx"], int)  # a symbol of the C or C++ runtime
        if re.match("_?Py", name):
            complaints.append(f"it uses Python's {name}")
        elif name in WEAK:
            if symbol["st_info"]["bind"] != "STB_WEAK":
                complaints.append(f"{name} must be weak")
        elif not versioned and name not in TORCH_SYMBOLS:
            complaints.append(f"it uses {name}, which is not in torch_symbols.txt")
    return complaints


def instruction_set_complaints(build: Path) -> list[str]:
    complaints = []
    for path in sorted((build / "CMakeFiles/fastattn.dir/csrc/cpu").glob("*_avx*.cpp.o")):
        tag = "Avx512" if "avx512" in path.name else "Avx2"
        with path.open("rb") as file:
            table = ELFFile(file).get_section_by_name(".symtab")
            for symbol in table.iter_symbols():
                defined = symbol["st_shndx"] != "SHN_UNDEF" and symbol["st_info"]["type"] == "STT_FUNC"
                if defined and symbol["st_info"]["bind"] == "STB_WEAK" and tag not in symbol.name:
                    complaints.append(f"{path.name} holds a shared copy of {symbol.name}")
    return complaints


def main(wheel: str, build: str | None = None) -> None:
    complaints = wheel_complaints(Path(wheel)) + (instruction_set_complaints(Path(build)) if build else [])
    if complaints:
        sys.exit("\n".join([f"{wheel} is not fit to be handed out:", *complaints]))
    print(f"{wheel}: {Path(wheel).stat().st_size / 1e6:.2f} MB, fit to be handed out")  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
