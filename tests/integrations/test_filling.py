"""Any range of a tensor out of any parts in any order: what numpy says it is."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.errors import Damaged
from everstep.integrations import filling
from everstep.integrations.checkpoint import Box, Source, Tensor, contiguous, covering
from everstep.integrations.filling import Files, ranges

SHAPES = st.lists(st.integers(1, 6), min_size=0, max_size=4).map(tuple)
DTYPES = {"uint8": 1, "float16": 2, "float32": 4, "int64": 8, "complex128": 16}


@given(SHAPES, st.data())
def test_ranges_are_the_elements_in_their_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    numbers = np.arange(int(np.prod(shape))).reshape(shape)
    begin = data.draw(st.integers(0, numbers.size))
    end = data.draw(st.integers(begin, numbers.size))
    found: list[int] = []
    boxes = list(ranges(shape, begin, end))
    for at, extent in boxes:
        part = numbers[tuple(slice(a, a + n) for a, n in zip(at, extent, strict=True))]
        found += part.reshape(-1).tolist()
    assert found == list(range(begin, end))
    assert len(boxes) <= max(2 * len(shape) - 1, 1)


def cut(shape: tuple[int, ...], draw: Any) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The shape in boxes, cut again and again."""
    boxes = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 4)) if shape else 0):
        number = draw(st.integers(0, len(boxes) - 1))
        at, extent = boxes[number]
        axis = draw(st.integers(0, len(shape) - 1))
        if extent[axis] < 2:
            continue
        size = draw(st.integers(1, extent[axis] - 1))
        low, high = list(extent), list(extent)
        low[axis], high[axis] = size, extent[axis] - size
        moved = list(at)
        moved[axis] += size
        boxes[number : number + 1] = [(at, tuple(low)), (tuple(moved), tuple(high))]
    return boxes


@settings(deadline=None)
@given(SHAPES, st.sampled_from(sorted(DTYPES)), st.data())
def test_any_range_out_of_any_parts(shape: tuple[int, ...], dtype: str, data: st.DataObject) -> None:
    size = DTYPES[dtype]
    whole = np.random.default_rng(1).integers(0, 256, (*shape, size), dtype=np.uint8)
    raw = whole.reshape(-1)
    with tempfile.TemporaryDirectory() as directory, Files() as files:
        boxes = []
        for number, (at, extent) in enumerate(cut(shape, data.draw)):
            part = whole[tuple(slice(a, a + n) for a, n in zip(at, extent, strict=True))]
            order = data.draw(st.permutations(range(len(shape))))
            # In another order of its dimensions, and behind something else.
            laid = np.ascontiguousarray(part.transpose(*order, len(shape)))
            strides = [0] * len(shape)
            for axis, stride in zip(order, contiguous(laid.shape[:-1]), strict=True):
                strides[axis] = stride
            ahead = data.draw(st.sampled_from([0, 3, 64, 5000]))
            path = Path(directory, str(number)) if data.draw(st.booleans()) else None
            content = b"#" * ahead + laid.tobytes()
            if path is not None:
                path.write_bytes(content + b"###")
            source = Source(path, ahead, tuple(strides), b"" if path else content)
            boxes.append(Box(at, extent, source))
        tensor = covering("it", Tensor(dtype, shape, tuple(data.draw(st.permutations(boxes)))))
        count = raw.size // size
        begin = data.draw(st.integers(0, count))
        end = data.draw(st.integers(begin, count))
        memory = bytearray(b"\xee" * ((end - begin) * size))
        files.fill(memoryview(memory), tensor, begin * size)
        assert bytes(memory) == raw[begin * size : end * size].tobytes()


def test_parts_must_make_up_the_tensor(tmp_path: Path) -> None:
    source = Source(None, 0, (1,), bytes(100))

    def tensor(*boxes: tuple[int, int]) -> Tensor:
        return Tensor("uint8", (10,), tuple(Box((at,), (n,), source) for at, n in boxes))

    covering("x", tensor((0, 4), (4, 6)))
    for wrong in [((0, 4),), ((0, 4), (3, 6)), ((0, 4), (5, 6)), ((0, 4), (4, 7)), ((0, 5), (0, 5)), ()]:
        with pytest.raises(Damaged, match="do not make up a tensor"):
            covering("x", tensor(*wrong))


def test_a_file_that_shrinks_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(40))
    for strides in ((1,), (3,)):
        tensor = Tensor.whole("uint8", (100,), Source(path, 0, strides))
        with Files() as files, pytest.raises(Damaged, match="has changed while it was read"):
            files.fill(memoryview(bytearray(100)), tensor, 0)
    path.unlink()
    with Files() as files, pytest.raises(Damaged, match="has changed"):
        files.fill(memoryview(bytearray(10)), Tensor.whole("uint8", (10,), Source(path, 0, (1,))), 0)


def test_few_files_are_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filling, "_OPEN_FILES", 3)
    with Files() as files:
        for round in range(2):
            for number in range(8):
                path = tmp_path / str(number)
                path.write_bytes(bytes([number] * 4))
                memory = bytearray(4)
                files.fill(memoryview(memory), Tensor.whole("uint8", (4,), Source(path, 0, (1,))), 0)
                assert memory == bytes([number] * 4), round
                assert len(files._open) <= 3
