"""Checks the machine code of the GPU kernels: python tests/guards/check_sass.py build/fastattn_torch.so

What a GPU would show as lost speed, a machine without one can read. The main kernels multiply with warpgroup
instructions (HGMMA, or IGMMA and QGMMA for 8 bits), load tiles with the bulk copy engine (UTMALDG), and between their
first and their last product keep everything in registers: an access to local memory there is a spill or an array
indexed at run time. (The producer, whose code lies outside, may spill: it has 24 registers, walks lists, and waits most
of the time.) All gradients at once read a word of it, of grids, and of sequences at head_dim 64 four.
"""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from sysconfig import get_paths

MAIN_KERNELS = re.compile(r"(forward|gradient|estimate)_kernel")
PRODUCTS = ("HGMMA", "IGMMA", "QGMMA")
COPY = "UTMALDG"
LOCAL_MEMORY = ("LDL", "STL")
MAY_SPILL = {  # how often, among about 1,500 instructions
    re.compile(r"KeyGradientKernel.*Boxes.*QuerySumsE1E"): 1,
    re.compile(r"KeyGradientKernel.*varlen.*ConfigELi64E.*QuerySumsE1E"): 4,
}


def disassemble(library: Path) -> dict[str, list[str]]:
    """The instructions of each kernel, in order."""
    cuobjdump = Path(get_paths()["purelib"]) / "nvidia/cu13/bin/cuobjdump"  # dependency group `sass`
    listing = subprocess.run([cuobjdump, "-sass", library], check=True, stdout=subprocess.PIPE, text=True).stdout
    kernels: dict[str, list[str]] = {}
    for line in listing.splitlines():
        if function := re.search(r"Function : (\S+)", line):
            instructions = kernels.setdefault(function[1], [])
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?([A-Z][A-Z0-9]*)", line):
            instructions.append(instruction[1])
    return kernels


def among_products(instructions: list[str]) -> list[str]:
    """What lies between the first and the last matrix product."""
    products = [i for i, instruction in enumerate(instructions) if instruction in PRODUCTS]
    return instructions[products[0] : products[-1]] if products else []


def complaints(kernels: dict[str, list[str]]) -> list[str]:
    main = {name: instructions for name, instructions in kernels.items() if MAIN_KERNELS.search(name)}
    found = [] if main else ["there is no main kernel in it"]
    for name, instructions in main.items():
        found += [] if COPY in instructions else [f"{name} has no {COPY}"]
        found += [] if set(PRODUCTS) & set(instructions) else [f"{name} has none of {', '.join(PRODUCTS)}"]
        count = Counter(among_products(instructions))
        allowed = max((most for kind, most in MAY_SPILL.items() if kind.search(name)), default=0)
        if sum(count[i] for i in LOCAL_MEMORY) > allowed:
            found += [f"{name} uses local memory among its products: {count[i]} {i}" for i in LOCAL_MEMORY if count[i]]
    return found


def main(library: str) -> None:
    kernels = disassemble(Path(library))
    if found := complaints(kernels):
        sys.exit("\n".join([f"{library}: its GPU kernels are not what they should be:", *found]))
    main_kernels = sum(1 for name in kernels if MAIN_KERNELS.search(name))
    print(f"{library}: {main_kernels} main kernels with warpgroup products, and no local memory but what is allowed")  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
