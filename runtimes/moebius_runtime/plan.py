"""What filling a mask will take, known before any of it is done: squares of the network and denoising steps."""

from __future__ import annotations

from dataclasses import dataclass

from moebius_runtime.squares import Square, apart


@dataclass(frozen=True, eq=False)
class Plan:
    """The squares that a mask needs, in the order in which they are filled.

    Attributes:
        squares: see `moebius_runtime.squares`.
        shape: height and width of the picture.
        size: the network's side in pixels.
        steps: denoising steps per square.
    """

    squares: tuple[Square, ...]
    shape: tuple[int, int]
    size: int
    steps: int

    @property
    def runs(self) -> list[list[Square]]:
        """The squares in their order, cut where one has to see what earlier ones have filled."""
        return apart(list(self.squares), self.shape)

    @property
    def total_steps(self) -> int:
        """Denoising steps over all squares: the runs of the U-Net."""
        return len(self.squares) * self.steps

    @property
    def scales(self) -> tuple[float, float]:
        """The smallest and the largest number of picture pixels, along an axis, per pixel of the network."""
        sides = [square.crop.side / self.size for square in self.squares]
        return min(sides), max(sides)

    def describe(self) -> str:
        """A summary for the user, such as `16 squares of 512 pixels, 20 steps each`."""
        sides = sorted({square.crop.side for square in self.squares})
        pixels = str(sides[0]) if len(sides) == 1 else f"{sides[0]} to {sides[-1]}"
        squares, steps = ("s" if count != 1 else "" for count in (len(self.squares), self.steps))
        return f"{len(self.squares)} square{squares} of {pixels} pixels, {self.steps} step{steps} each"

    def estimate(self, seconds: float) -> str:
        """The time of all steps, such as `about 12 minutes`, from the measured `seconds` of one."""
        total = self.total_steps * seconds
        if total < 90:
            return f"about {max(1, round(total))} second{'s' * (round(total) > 1)}"
        if total < 90 * 60:
            return f"about {round(total / 60)} minutes"
        return f"about {total / 3600:.1f} hours"
