"""Draws the pictures of docs/kernels/{sm80,backward,emulator}.md.

python scripts/draw_kernels.py
"""

from __future__ import annotations

import pathlib

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "docs/kernels"

QUERY, KEY, VALUE, SCORE, OTHER = "#cfe3ff", "#ffe2bf", "#d8f0d2", "#f3d6ee", "#e6e6e6"
GROUPS = ["#4e79a7", "#f28e2b", "#e15759", "#76b7b2", "#59a14f", "#edc948", "#b07aa1", "#9c755f"]


class Picture:
    """An SVG under construction; coordinates in pixels."""

    def __init__(self, width: int, height: int) -> None:
        self.lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
            ' font-family="sans-serif" font-size="13">',
            f'<rect width="{width}" height="{height}" fill="white"/>',
        ]

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        anchor: str = "middle",
        size: int = 13,
        fill: str = "black",
        bold: bool = False,
    ) -> None:
        weight = ' font-weight="bold"' if bold else ""
        words = words.replace("&", "&amp;").replace("<", "&lt;")
        self.lines.append(
            f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}"'
            f' fill="{fill}"{weight}>{words}</text>'
        )

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str,
        words: str = "",
        size: int = 13,
    ) -> None:
        self.lines.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{fill}" stroke="#555"/>'
        )
        for i, line in enumerate(words.split("\n") if words else []):
            top = y + height / 2 + size * 0.35 - (words.count("\n") / 2 - i) * size * 1.2
            self.text(x + width / 2, top, line, size=size)

    def arrow(self, x1: float, y1: float, x2: float, y2: float) -> None:
        length = ((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5
        dx, dy = (x2 - x1) / length * 8, (y2 - y1) / length * 8
        head = (
            f"{x2},{y2} {x2 - dx - dy / 2},{y2 - dy + dx / 2} {x2 - dx + dy / 2},{y2 - dy - dx / 2}"
        )
        self.lines.append(f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="#333"/>')
        self.lines.append(f'<polygon points="{head}" fill="#333"/>')

    def svg(self) -> str:
        return "\n".join([*self.lines, "</svg>", ""])

    def write(self, name: str) -> None:
        (FOLDER / name).write_text(self.svg())


def phase(row: int, atom_chunks: int) -> int:
    """SwizzledTile::phase of kernels/common/swizzle.cuh."""
    return row % 8 if atom_chunks == 8 else row // 2 % 4


def draw_swizzle() -> None:
    """Where the 16-byte chunks of eight rows lie in shared memory, and in which banks."""
    picture = Picture(980, 420)
    panels = [
        (20, "head_dim 64: a row is one atom of 128 bytes", 8, 8),
        (500, "head_dim 96: rows of three atoms of 64 bytes", 12, 4),
    ]
    for left, title, chunks, atom in panels:
        picture.text(left + 225, 24, title, size=15, bold=True)
        picture.text(
            left, 46, "each cell: the chunk (8 elements) that is stored there;", anchor="start"
        )
        picture.text(left, 62, "colour: its four banks of 32", anchor="start")
        size = 340 / chunks
        for row in range(8):
            picture.text(left + 52, 96 + row * 36, f"row {row}", anchor="end")
            for place in range(chunks):
                chunk = place // atom * atom + (place % atom ^ phase(row, atom))
                group = (row * chunks + place) % 8
                x, y = left + 60 + place * (size + 1), 78 + row * 36
                picture.box(x, y, size, 28, GROUPS[group])
                picture.text(x + size / 2, y + 19, str(chunk), fill="white", bold=chunk == 2)
        picture.text(
            left + 225,
            390,
            "ldmatrix reads one chunk of eight rows: chunk 2 (bold) has every colour once",
            size=12,
        )
    picture.write("sm80_swizzle.svg")


def draw_tiles() -> None:
    """What one block of the forward kernel holds, and which warp has what."""
    picture = Picture(980, 470)
    picture.text(
        490,
        24,
        "One block of the forward kernel, head_dim 128: 128 query rows, 4 warps",
        size=16,
        bold=True,
    )
    picture.text(120, 66, "Q, shared memory", size=13)
    for warp in range(4):
        picture.box(40, 80 + warp * 70, 160, 70, QUERY, f"warp {warp}\n32 rows x 128")
    for i, label in enumerate(("K tile, shared\n64 keys x 128", "V tile, shared\n64 keys x 128")):
        picture.box(260 + i * 420, 380, 160, 70, (KEY, VALUE)[i], label)
    for warp in range(4):
        picture.box(260, 80 + warp * 70, 160, 70, SCORE, "S, P: 32 x 64\n64 registers")
        picture.box(680, 80 + warp * 70, 160, 70, VALUE, "out: 32 x 128\n128 registers")
    picture.text(340, 66, "registers of the same warp")
    picture.text(760, 66, "registers of the same warp")
    picture.arrow(204, 220, 256, 220)
    picture.text(230, 210, "Q Kᵀ")
    picture.arrow(340, 376, 340, 364)
    picture.arrow(424, 220, 676, 220)
    picture.text(550, 210, "softmax, P V; P replaces S")
    picture.arrow(760, 376, 760, 364)
    picture.text(855, 115, "row max and sum:", anchor="start", size=12)
    picture.text(855, 132, "4 lanes a row", anchor="start", size=12)
    picture.write("sm80_tiles.svg")


def draw_pipeline() -> None:
    """The forward kernel over time: what the tensor cores, the other units and the copies do."""
    picture = Picture(980, 250)
    picture.text(490, 24, "Forward: one buffer for keys, one for values", size=16, bold=True)
    for y, name in ((60, "tensor cores"), (110, "other units"), (160, "copies (cp.async)")):
        picture.text(140, y + 20, name, anchor="end")
    step, left = 270, 150
    for i, tile in enumerate(("n", "n-1", "n-2")):
        x, following = left + i * step, ("n-1", "n-2", "n-3")[i]
        picture.box(x, 60, 100, 30, SCORE, f"Q K[{tile}]ᵀ")
        picture.box(x + 100, 110, 70, 30, OTHER, "softmax")
        picture.box(x + 170, 60, 100, 30, VALUE, f"P V[{tile}]")
        picture.box(x, 160, 100, 30, VALUE, f"V[{tile}]")
        picture.box(x + 100, 160, 170, 30, KEY, f"K[{following}]")
        for at in (x, x + 100):
            picture.lines.append(
                f'<line x1="{at}" y1="50" x2="{at}" y2="200" stroke="#c00" stroke-dasharray="4 3"/>'
            )
    picture.text(
        490,
        225,
        "red: own copies have arrived, then __syncthreads; a second block fills the gaps",
    )
    picture.write("sm80_pipeline.svg")


def draw_decode() -> None:
    """How a decode block and its warps share the keys."""
    picture = Picture(980, 330)
    picture.text(
        490,
        24,
        "Decode: 16 rows (queries x heads of a group), keys cut over parts and warps",
        size=16,
        bold=True,
    )
    picture.text(110, 84, "keys", anchor="end")
    for i in range(24):
        part, warp = i // 8, i % 4
        picture.box(120 + i * 34, 64, 34, 30, GROUPS[warp], "")
        picture.text(137 + i * 34, 84, str(warp), fill="white")
        if i % 8 == 0:
            picture.text(256 + part * 272, 56, f"part {part}: one block")
    for part in range(3):
        x = 130 + part * 272
        for warp in range(4):
            picture.box(x + warp * 64, 130, 56, 40, GROUPS[warp])
            picture.text(x + warp * 64 + 28, 155, f"warp {warp}", fill="white", size=12)
        picture.arrow(x + 126, 174, x + 126, 196)
        picture.box(x, 200, 252, 34, OTHER, "combined in shared memory")
        picture.arrow(x + 126, 238, 525, 272)
    picture.box(350, 276, 350, 36, VALUE, "second kernel, where there are several parts")
    picture.text(110, 155, "own buffers,", anchor="end")
    picture.text(110, 171, "no barrier", anchor="end")
    picture.write("sm80_decode.svg")


def draw_backward_step() -> None:
    """One step of the backward's key kernel over time."""
    picture = Picture(1000, 250)
    picture.text(
        500, 24, "Backward: one tile of queries meets the block's keys", size=16, bold=True
    )
    for y, name in ((60, "tensor cores"), (110, "other units"), (160, "copies (cp.async)")):
        picture.text(140, y + 20, name, anchor="end")
    left = 150
    for x, width, fill, words in (
        (0, 130, SCORE, "S = Q Kᵀ"),
        (130, 130, SCORE, "dP = dO Vᵀ"),
        (320, 130, VALUE, "dV += Pᵀ dO"),
        (450, 170, KEY, "dQ = dS K"),
        (620, 190, QUERY, "dK += dSᵀ Q"),
    ):
        picture.box(left + x, 60, width, 30, fill, words)
    for x, width, words in (
        (70, 120, "P; store"),
        (230, 90, "dS; store"),
        (490, 130, "add to dQ's sums"),
    ):
        picture.box(left + x, 110, width, 30, OTHER, words, 12)
    picture.box(left, 160, 810, 30, QUERY, "Q of the next step, into the other buffer")
    picture.box(left + 450, 194, 360, 30, VALUE, "dO of the next step")
    for x in (0, 320, 450, 810):
        picture.lines.append(
            f'<line x1="{left + x}" y1="50" x2="{left + x}" y2="230" stroke="#c00"'
            ' stroke-dasharray="4 3"/>'
        )
    picture.text(
        left, 245, "red: __syncthreads; at the first one own copies have arrived", anchor="start"
    )
    picture.write("backward_step.svg")


def draw_backward_dq() -> None:
    """The two ways to dq."""
    picture = Picture(1000, 330)
    picture.text(250, 24, "5 products: key blocks add to dq", size=16, bold=True)
    picture.text(750, 24, "7 products: dq by blocks of its own", size=16, bold=True)
    for left, by_rows in ((60, False), (560, True)):
        for row in range(5):
            for column in range(5):
                color = GROUPS[row if by_rows else column]
                picture.box(left + 60 + column * 50, 90 + row * 34, 50, 34, color)
        picture.text(left + 185, 80, "key tiles")
        picture.text(left + 50, 180, "query", anchor="end")
        picture.text(left + 50, 196, "tiles", anchor="end")
        picture.arrow(left + 316, 175, left + 350, 175)
        for row in range(5):
            color = GROUPS[row] if by_rows else SCORE
            picture.box(left + 354, 90 + row * 34, 60, 34, color, "" if by_rows else "sum")
        picture.text(left + 384, 80, "dq")
    picture.text(250, 290, "a block is a column: red.add in fp32,")
    picture.text(250, 308, "the order of additions varies; then rounded")
    picture.text(750, 290, "a block is a row, after dk and dv: no")
    picture.text(750, 308, "additions between blocks, the same bits")
    picture.write("backward_dq.svg")


def draw_emulator() -> None:
    """From a kernel's source to a report."""
    picture = Picture(980, 300)
    picture.text(490, 24, "The same source, on a GPU and on the emulator", size=16, bold=True)
    picture.box(20, 110, 130, 60, QUERY, "kernels/sm80/\nforward.cuh")
    picture.box(210, 50, 150, 50, OTHER, "C++: launchers;\nNVRTC: cubins")
    picture.box(210, 180, 150, 50, OTHER, "NVRTC: PTX\n-lineinfo")
    picture.arrow(154, 130, 206, 80)
    picture.arrow(154, 150, 206, 200)
    picture.box(420, 180, 150, 50, KEY, "ptx_to_cpp:\none C++ function")
    picture.arrow(364, 205, 416, 205)
    picture.box(630, 180, 150, 50, KEY, "threads as fibers,\nclocks, shadows")
    picture.arrow(574, 205, 626, 205)
    picture.box(420, 50, 150, 50, VALUE, "launchers: the\nlibrary's own")
    picture.arrow(364, 75, 416, 75)
    picture.box(630, 50, 150, 50, VALUE, "CUDA driver\nof the emulator")
    picture.arrow(574, 75, 626, 75)
    picture.arrow(705, 104, 705, 176)
    picture.text(712, 145, "by mangled name", anchor="start", size=12)
    picture.box(840, 110, 125, 60, SCORE, "results, reports\nwith source lines")
    picture.arrow(784, 195, 836, 158)
    picture.text(
        490,
        275,
        "Checked against a float64 reference; order of accesses by vector clocks, not by luck.",
    )
    picture.write("emulator.svg")


def main() -> None:
    for draw in (
        draw_swizzle,
        draw_tiles,
        draw_pipeline,
        draw_decode,
        draw_backward_step,
        draw_backward_dq,
        draw_emulator,
    ):
        draw()


if __name__ == "__main__":
    main()
