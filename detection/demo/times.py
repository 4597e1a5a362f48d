"""When frames are shown: rates of file headers made exact, timestamps of containers made usable."""

from __future__ import annotations

import math
from fractions import Fraction

_DAY = 86_400
SLOWEST, FASTEST = 1 / _DAY, 1000.0  # frames per second that a header may announce
_NTSC = (24, 30, 48, 60, 120)
_SMALL_STEP_BACK = Fraction(1)  # seconds; a clock that goes back further was set anew


def exact_rate(fps: float, default: Fraction = Fraction(30)) -> Fraction:
    """The fraction behind a rate rounded by a file header: 29.97 is 30000/1001. Nonsense gives the default."""
    if not math.isfinite(fps) or not SLOWEST <= fps <= FASTEST:
        return default
    for n in _NTSC:
        if abs(fps - n * 1000 / 1001) < 0.004:
            return Fraction(n * 1000, 1001)
    if fps < 1:  # the seconds between two frames are the round number
        return 1 / Fraction(1 / fps).limit_denominator(1001)
    return Fraction(fps).limit_denominator(1001)


def timescale(rate: Fraction) -> int:
    """Ticks per second for an .mp4 in which every frame of a constant ``rate`` starts at a whole tick.

    About 60,000: MPEG-4 has 16 bits for it. Slow rates have less, as a frame lasts at most 2^31 ticks.
    """
    return rate.numerator * max(1, min(65535 // rate.numerator, 2**29 // rate.denominator))


def longest_gap(ticks: int) -> Fraction:
    """Seconds between two frames that an .mp4 of that timescale can hold: 9 hours for usual rates, at most a day."""
    while ticks < 10_000:  # FFmpeg doubles small ones
        ticks *= 2
    return min(Fraction(2**31 - 2**16, ticks), Fraction(_DAY))  # MPEG-4 spends a bit on every second


class FrameTimes:
    """Turns the timestamps of a container into times that start at 0 and increase.

    A time that lies beside the grid of the constant ``rate`` by no more than the container rounds is put on it, so that
    a constant rate is exact again (.webm and .mkv count in milliseconds). Other times stay as they are, except those
    that cannot be: a missing or infinite one follows the last frame after 1 / ``rate``; an equal one, or one that goes
    back a little, follows at once; after a larger step back, or forward by more hours than an .mp4 can hold, the clock
    counts from there on.

    Args:
        rate: the nominal frames per second.
        tick: seconds to which the container rounds; 0: it does not.

    Attributes:
        repaired: timestamps that were there and could not be used.

    Example:
        >>> times = FrameTimes(Fraction(30), Fraction(1, 1000))
        >>> [times(Fraction(ms, 1000)) for ms in (7, 40, 74, 200)]
        [Fraction(0, 1), Fraction(1, 30), Fraction(1, 15), Fraction(193, 1000)]
    """

    def __init__(self, rate: Fraction, tick: Fraction = Fraction(0)):
        self.rate, self.repaired = rate, 0
        interval = 1 / rate
        # a coarse tick is the container's frame number: its times are exact, but its rate may be a rounded one
        self._tolerance = tick if tick <= interval / 4 else interval / 16
        self._step = min(interval / 2, Fraction(1, 1000))
        self._back = max(_SMALL_STEP_BACK, 3 * interval)
        self._longest = longest_gap(timescale(rate))
        self._origin: Fraction | None = None
        self._shift = Fraction(0)
        self._last: Fraction | None = None

    def __call__(self, stamp: Fraction | float | None) -> Fraction:
        """The time of the next frame in seconds, from its timestamp in seconds."""
        expected = Fraction(0) if self._last is None else self._last + 1 / self.rate
        if isinstance(stamp, float) and not math.isfinite(stamp):
            self.repaired += 1
            stamp = None
        if stamp is None:
            time = expected
        else:
            if self._origin is None:
                self._origin = Fraction(stamp) - expected
            time = self._usable(Fraction(stamp) - self._origin, expected)
        on_grid = round(time * self.rate) / self.rate
        if abs(on_grid - time) <= self._tolerance and (self._last is None or on_grid > self._last):
            time = on_grid
        self._last = time
        return time

    def length(self, lasts: Fraction | None) -> Fraction | None:
        """How long a frame is shown; ``None`` where that is 1 / ``rate`` but for the container's rounding."""
        return None if lasts is None or abs(lasts - 1 / self.rate) <= self._tolerance else lasts

    def _usable(self, time: Fraction, expected: Fraction) -> Fraction:
        last = self._last
        if last is None:
            return time
        for candidate in (time, time + self._shift):
            if last < candidate <= last + self._longest:
                return candidate
        self.repaired += 1
        if last - self._back < time + self._shift <= last:
            return last + self._step
        self._shift = expected - time
        return expected
