"""Squares: they share out the mask, keep near the network's size, see known pixels, and come in a good order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebius_runtime.errors import InputError
from moebius_runtime.regions import Crop, apart, find_crops, find_squares, whole_crop, whole_square, window
from moebius_runtime.regions.cells import thickness
from moebius_runtime.regions.crop import largest_side


def masked(shape: tuple[int, int], *boxes: tuple[int, int, int, int]) -> np.ndarray:
    """A mask with rectangles (top, left, height, width)."""
    mask = np.zeros(shape, bool)
    for top, left, height, width in boxes:
        mask[top : top + height, left : left + width] = True
    return mask


def line(mask: np.ndarray, start: tuple[int, int], end: tuple[int, int], width: int) -> np.ndarray:
    """Adds a line from one (row, column) to another, `width` pixels across."""
    count = max(abs(a - b) for a, b in zip(start, end, strict=True)) + 1
    rows, columns = (np.linspace(a, b, count).round().astype(int) for a, b in zip(start, end, strict=True))
    for offset in range(-(width // 2), width - width // 2):
        steep = abs(start[0] - end[0]) > abs(start[1] - end[1])
        y = np.clip(rows + (0 if steep else offset), 0, mask.shape[0] - 1)
        x = np.clip(columns + (offset if steep else 0), 0, mask.shape[1] - 1)
        mask[y, x] = True
    return mask


def specks(shape: tuple[int, int], count: int, seed: int = 0, radius: int = 5) -> np.ndarray:
    rng = np.random.default_rng(seed)
    corners = zip(rng.integers(0, shape[0] - 10, count), rng.integers(0, shape[1] - 10, count), strict=True)
    return masked(shape, *((int(y), int(x), 2 * radius, 2 * radius) for y, x in corners))


def disc(shape: tuple[int, int], centre: tuple[int, int], radius: int) -> np.ndarray:
    y, x = np.ogrid[: shape[0], : shape[1]]
    return (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2


BIG = (4000, 6000)
FRAME = masked(BIG, (0, 0, 40, 6000), (3960, 0, 40, 6000), (0, 0, 4000, 40), (0, 5960, 4000, 40))


# --- the cases that this is for -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "most"),
    [
        # A square of 512 owns 384 inside its margins, or up to the picture's edge: ceil((6000 - 2 * 64) / 384) = 16.
        (line(np.zeros(BIG, bool), (1500, 0), (2300, 5999), 7), 16),
        (line(np.zeros(BIG, bool), (0, 0), (3999, 5999), 7), 16),
        (line(np.zeros(BIG, bool), (3999, 0), (0, 5999), 7), 18),  # rising: a greedy cover from above needs more
        (line(np.zeros((300, 20000), bool), (100, 0), (200, 19999), 9), 52),  # ceil((20000 - 128) / 384)
        (line(np.zeros((20000, 300), bool), (0, 100), (19999, 200), 9), 52),
        (FRAME, 2 * 16 + 2 * 10 - 2),
        (specks(BIG, 100), 64),
        (disc(BIG, (2000, 3000), 1500) & ~disc(BIG, (2000, 3000), 1480), 40),
    ],
    ids=["wire", "diagonal", "rising", "scratch", "upright scratch", "frame", "100 specks", "ring"],
)
def test_thin_and_scattered_masks_are_filled_at_the_pictures_own_resolution(mask, most):
    crops = find_crops(mask)
    assert {crop.side for crop in crops} == {512}
    assert len(crops) <= most


def test_a_long_thick_scratch_keeps_to_twice_the_networks_size():
    squares = find_squares(masked((1500, 20000), (600, 100, 300, 19800)))
    # 300 thick: each owns about 600 of its length, and its margins are together 300.
    assert all(512 <= square.crop.side <= 1024 for square in squares)
    assert len(squares) <= 34
    squares = find_squares(masked((4000, 20000), (1000, 100, 1000, 19800)))
    assert all(square.crop.side <= 2100 for square in squares)  # 1,000 long and 500 to either side


@pytest.mark.parametrize("mask", [masked(BIG, (500, 1500, 3000, 3000)), disc(BIG, (2000, 3000), 1500)])
def test_a_large_compact_region_is_one_square_with_context(mask):
    (square,) = find_squares(mask)
    rows, columns = window(square.crop, mask.shape)
    # A disc of 3000 holds a square of 2121: that is its thickness.
    assert 3000 + 2000 <= square.crop.side <= 6000
    assert (rows.start, rows.stop) == (0, 4000)
    assert columns.start <= 1500 - 1000
    assert columns.stop >= 4500 + 1000


def test_parts_of_different_thickness_get_squares_of_their_own():
    mask = disc(BIG, (2000, 1500), 500)
    line(mask, (2000, 1500), (2100, 5999), 7)
    large, *rest = sorted(find_squares(mask), key=lambda square: -square.crop.side)
    assert 1000 < large.crop.side < 2200
    assert {square.crop.side for square in rest} == {512}
    assert len(rest) <= 12  # 4000 pixels of wire; 384 each


def test_a_small_region_is_never_cut():
    for left in range(900, 1300, 37):
        mask = masked((3000, 3000), (1000, 700, 8, 40), (1020, left, 100, 300), (1100, left + 340, 8, 8))
        owners = [square for square in find_squares(mask) if square.own(mask).sum() >= 100 * 300]
        assert len(owners) == 1


def test_what_fits_in_one_square_shares_it():
    near, other, far = (100, 100, 20, 20), (100, 400, 20, 20), (100, 1200, 20, 20)
    assert len(find_squares(masked((2000, 2000), near, other))) == 1
    assert len(find_squares(masked((2000, 2000), near, other, far))) == 2
    # The speck in the middle first goes with the long region to the right, of which it can hold only the beginning.
    left, middle, right = (1008, 704, 8, 8), (992, 1008, 8, 8), (1008, 1328, 48, 320)
    assert len(find_squares(masked((3000, 3000), left, middle, right))) == 2
    # A speck beside a region of moderate size is filled along with it; beside a huge one it keeps its resolution.
    assert len(find_squares(masked((2000, 2000), (500, 500, 300, 300), (600, 850, 9, 9)))) == 1
    assert [crop.side for crop in find_crops(masked((8000, 8000), (2000, 2000, 3000, 3000), (3000, 5900, 9, 9)))] == [
        512,
        6000,
    ]


def test_dense_dust_is_no_thick_region():
    mask = np.zeros((2000, 3000), bool)
    mask[::15, ::15] = True  # every cell of 16 pixels has some
    assert {crop.side for crop in find_crops(mask)} == {512}


# --- where squares lie ----------------------------------------------------------------------------------------


def test_a_small_region_gets_the_network_size_around_it():
    assert find_crops(masked((3000, 4000), (1000, 2000, 100, 60))) == [Crop(2030 - 256, 1050 - 256, 512)]


def test_a_large_region_gets_context_of_its_thickness():
    assert find_crops(masked((3000, 4000), (1008, 1008, 608, 400))) == [Crop(1208 - 504, 1312 - 504, 1008)]


@pytest.mark.parametrize(
    ("box", "corner"),
    [
        ((0, 0, 9, 9), (0, 0)),
        ((0, 991, 9, 9), (488, 0)),
        ((791, 0, 9, 9), (0, 288)),
        ((791, 991, 9, 9), (488, 288)),
        ((400, 0, 1, 1), (0, 144)),
    ],
)
def test_at_edges_the_square_moves_into_the_picture(box, corner):
    assert find_crops(masked((800, 1000), box)) == [Crop(*corner, 512)]


def test_pictures_about_as_small_as_the_network_are_one_square():
    assert find_crops(masked((64, 64), (10, 10, 5, 5))) == [Crop(0, 0, 64)]
    # The longer side; what lies beyond the shorter is filled by reflection, half on either side.
    assert find_crops(masked((300, 400), (0, 0, 5, 5))) == [Crop(0, -50, 400)]
    assert find_crops(masked((300, 4000), (0, 3000, 5, 5))) == [Crop(3002 - 256, -106, 512)]
    assert find_crops(masked((512, 512), (5, 5, 400, 400))) == [Crop(0, 0, 512)]
    assert find_crops(line(np.zeros((480, 640), bool), (0, 0), (479, 639), 5)) == [Crop(0, -80, 640)]


@pytest.mark.parametrize("shape", [(8, 3000), (4, 700), (1, 300), (8, 511), (3000, 8), (16, 16), (1, 2)])
def test_pictures_of_any_shape_leave_a_latent_cell_across(shape):
    mask = np.zeros(shape, bool)
    mask.reshape(-1)[::2] = True
    for square in find_squares(mask):
        rows, columns = window(square.crop, shape)
        shorter = min(rows.stop - rows.start, columns.stop - columns.start)
        assert shorter * 512 / square.crop.side >= 8
    assert shape[0] != 8 or {square.crop.side for square in find_squares(mask)} <= {512, 455}  # 8 * 512 // 9


def test_a_picture_a_pixel_wider_than_the_square_is_not_reached_on_both_sides():
    """Found by the property below: in cells the square was as wide as the picture, so no margin was kept."""
    mask = np.zeros((126, 101), bool)
    points = [(11, 61), (13, 43), (36, 81), (37, 57), (43, 16), (58, 24), (81, 5), (86, 100), (103, 90)]
    mask[tuple(zip(*points, strict=True))] = True
    assert [(one.crop.left, one.crop.top) for one in find_squares(mask, 100)] == [(1, 26), (0, 0)]


# --- properties on generated masks ------------------------------------------------------------------------------


@st.composite
def masks(draw, smallest=1, longest=700):
    shape = draw(st.tuples(st.integers(smallest, longest), st.integers(smallest, longest)))
    mask, rng = np.zeros(shape, bool), np.random.default_rng(draw(st.integers(0, 1 << 20)))
    for kind in draw(st.lists(st.sampled_from(["box", "line", "specks", "disc", "noise"]), min_size=1, max_size=4)):
        (y, x), (v, u) = rng.integers(0, shape, (2, 2))
        width = int(rng.integers(1, 30))
        if kind == "box":
            mask[min(y, v) : max(y, v) + 1, min(x, u) : max(x, u) + 1] = True
        elif kind == "line":
            line(mask, (y, x), (v, u), width)
        elif kind == "disc":
            mask |= disc(shape, (y, x), int(rng.integers(1, 200)))
        elif kind == "specks":
            mask[rng.integers(0, shape[0], width), rng.integers(0, shape[1], width)] = True
        else:
            mask[: y + 1, : x + 1] |= rng.random((y + 1, x + 1)) < 0.01
    mask[tuple(rng.integers(0, shape))] = True
    mask[tuple(rng.integers(0, shape))] = False
    if not mask.any():
        mask[0, 0] = True
    return mask


@settings(max_examples=150, deadline=None)
@given(masks(), st.sampled_from([64, 100, 128]))
def test_squares_share_out_the_mask_and_see_around_it(mask, size):
    squares = find_squares(mask, size)
    owners = np.zeros(mask.shape, int)
    unknown = mask.copy()
    largest = largest_side(mask.shape, size)
    base = min(size, largest)
    for square in squares:
        view = window(square.crop, mask.shape)
        own = square.own(mask)
        assert own.any()
        owners[view] += own
        side = square.crop.side
        assert base <= side <= max(base, largest)
        assert min(part.stop - part.start for part in view) * size >= 8 * side  # a latent cell across
        # Context on all sides, but for the picture's edges.
        least = side / 12 - square.cell
        for axis, part, length in ((1, view[0], mask.shape[0]), (0, view[1], mask.shape[1])):
            found = np.flatnonzero(own.any(axis=axis))
            assert part.start == 0 or found[0] >= least
            assert part.stop == length or part.stop - part.start - 1 - found[-1] >= least
        # Near the network's size, unless the own part is one thick region.
        if side > 2 * size:
            solid = thickness(square.cells) * square.cell
            assert solid > size // 4
            assert max(square.cells.shape) * square.cell <= 5 * solid
        # Something is known when it is filled.
        assert mask.all() or not unknown[view].all()
        unknown[view] &= ~own
    assert np.array_equal(owners, mask.astype(int))
    again = find_squares(np.asfortranarray(mask), size)
    assert [square.crop for square in again] == [square.crop for square in squares]


@settings(max_examples=60, deadline=None)
@given(masks(), st.sampled_from([64, 128]))
def test_squares_of_one_run_share_no_pixel(mask, size):
    squares = find_squares(mask, size)
    runs = apart(squares, mask.shape)
    assert [square for run in runs for square in run] == squares
    for run in runs:
        held = np.zeros(mask.shape, int)
        for square in run:
            held[window(square.crop, mask.shape)] += 1
        assert held.max() == 1


@settings(max_examples=100, deadline=None)
@given(masks(), st.sampled_from([64, 128]))
def test_no_two_squares_of_thin_parts_could_be_one(mask, size):
    # The own part of a square of the network's size: its side less an eighth on either side.
    squares = [square for square in find_squares(mask, size) if square.crop.side == size]
    thick = [square for square in squares if thickness(square.cells) * square.cell > size // 4]
    squares = [square for square in squares if square not in thick]
    for index, one in enumerate(squares):
        for other in squares[:index]:
            low = np.minimum(one.corner, other.corner)
            high = np.maximum(np.add(one.corner, one.cells.shape), np.add(other.corner, other.cells.shape))
            assert (high - low).max() * one.cell > size * 3 // 4


@settings(max_examples=30, deadline=None)
@given(masks(longest=300), st.integers(0, 3), st.integers(0, 3))
def test_a_mask_that_moves_by_whole_squares_takes_its_squares_along(mask, down, right):
    size = 64

    def placed(y, x):
        canvas = np.zeros((1200, 1200), bool)
        canvas[256 + y : 256 + y + mask.shape[0], 256 + x : 256 + x + mask.shape[1]] = mask
        return find_squares(canvas, size)

    before, after = placed(0, 0), placed(down * size, right * size)
    moved = [Crop(s.crop.left + right * size, s.crop.top + down * size, s.crop.side) for s in before]
    wide = any(square.crop.side > 500 for square in before)  # reaches the canvas's edges
    assert wide or [square.crop for square in after] == moved


# --- order and limits -------------------------------------------------------------------------------------------


def test_a_wide_band_is_filled_from_what_is_known():
    """Across the whole picture, so that a square in the middle of it would see nothing."""
    mask = masked((300, 8000), (0, 500, 300, 7000))
    unknown, squares = mask.copy(), find_squares(mask)
    assert len(squares) >= 8
    for square in squares:
        view = window(square.crop, mask.shape)
        # Those in the middle see a margin of what the one before has filled, to one side: 150 pixels of 900.
        assert unknown[view].mean() <= 0.85
        unknown[view] &= ~square.own(mask)
    assert not unknown.any()


def test_a_wire_needs_few_runs():
    mask = line(np.zeros(BIG, bool), (1500, 0), (2300, 5999), 7)
    assert len(apart(find_squares(mask), mask.shape)) <= 4  # and not one per square


def test_specks_take_larger_squares_before_the_limit_refuses_them():
    mask = specks((2000, 3000), 200)
    free = find_squares(mask)
    assert {square.crop.side for square in free} == {512}
    bounded = find_squares(mask, limit=len(free) - 1)
    assert {square.crop.side for square in bounded} == {768}
    fewest = find_squares(mask, limit=len(bounded) - 1)
    assert {square.crop.side for square in fewest} == {1024}
    with pytest.raises(InputError, match=rf"needs {len(fewest)} squares .* limit of 3;.*--max-squares {len(fewest)}"):
        find_squares(mask, limit=3)
    assert len(find_squares(mask, limit=len(fewest))) == len(fewest)  # the advice works
    one = masked(BIG, (500, 1500, 3000, 3000))
    assert len(find_squares(one, limit=1)) == 1


def test_a_whole_square_owns_the_mask():
    mask = specks((200, 300), 9)
    square = whole_square(whole_crop(mask.shape), mask.shape)
    assert np.array_equal(square.own(mask), mask)


def test_an_empty_mask_is_a_callers_mistake():
    with pytest.raises(ValueError, match="empty"):
        find_squares(np.zeros((64, 64), bool))


def test_a_hundred_megapixels_stay_small_in_memory():
    mask = line(np.zeros((10_000, 10_000), bool), (0, 0), (9_999, 9_999), 9)
    squares = find_squares(mask)
    assert len(squares) <= 28
    assert sum(square.cells.nbytes for square in squares) < 1 << 16
