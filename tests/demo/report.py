# SPDX-License-Identifier: GPL-2.0
"""What the demo's figures are made of, and their picture."""

import json
import math


class Follow:
    """A file that others append lines to. Each line is parsed once, as it comes; one that is cut short
    (its writer was killed) is left out."""

    def __init__(self, path, parse):
        self.path, self.parse = path, parse
        self.offset, self.rest, self.items = 0, b"", []

    def read(self):
        """Everything so far."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                data = file.read()
        except FileNotFoundError:
            return self.items
        self.offset += len(data)
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            try:
                self.items.append(self.parse(line))
            except (ValueError, IndexError):
                pass
        return self.items


def trace(path):
    """Events of a remusctl trace."""
    return Follow(path, json.loads)


def records(path):
    """Replies as (time, latency in ms, value)."""

    def parse(line):
        words = line.split()
        return float(words[0]), float(words[1]), int(words[2])

    return Follow(path, parse)


def percentile(values, p):
    """Nearest rank; None without values."""
    if not values:
        return None
    values = sorted(values)
    return round(values[max(0, math.ceil(p / 100 * len(values)) - 1)], 3)


def spread(values, *names):
    ranks = {"p50": 50, "p99": 99, "max": 100}
    return {name: percentile(values, ranks[name]) for name in names}


def median(values):
    return percentile(values, 50)


def svg(replies, kill, resumed, first_after, title):
    """Reply times over time, y logarithmic, the kill marked, the take-over shaded."""
    width, height, left, right, top, bottom = 900, 420, 70, 20, 50, 50
    start = replies[0][0] if replies else kill
    end = max(replies[-1][0] if replies else kill, kill) + 0.2
    latencies = [max(latency, 0.1) for _, latency, _ in replies] or [1]
    low = math.floor(math.log10(min(latencies)))
    high = max(math.ceil(math.log10(max(latencies))), low + 1)

    def x(t):
        return left + (t - start) / (end - start) * (width - left - right)

    def y(latency):
        part = (math.log10(max(latency, 0.1)) - low) / (high - low)
        return height - bottom - part * (height - top - bottom)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img"'
        f' font-family="sans-serif" font-size="13">',
        f"<title>{title}</title>",
        "<style>"
        "svg{background:#fff;color:#222}.grid{stroke:#ddd}.dot{fill:#1f6fb4}"
        ".kill{stroke:#c0271b}.killt{fill:#c0271b}.shade{fill:#c0271b;fill-opacity:.12}"
        "@media(prefers-color-scheme:dark){svg{background:#16181c;color:#ddd}.grid{stroke:#3a3d44}"
        ".dot{fill:#6db3f2}.kill{stroke:#ff7b6b}.killt{fill:#ff7b6b}.shade{fill:#ff7b6b;fill-opacity:.18}}"
        "</style>",
        f'<text x="{left}" y="24" fill="currentColor" font-size="16">{title}</text>',
    ]
    if first_after is not None:
        out.append(
            f'<rect class="shade" x="{x(kill):.1f}" y="{top}" '
            f'width="{x(first_after) - x(kill):.1f}" height="{height - top - bottom}"/>'
        )
    for power in range(low, high + 1):
        at = y(10**power)
        label = f"{10**power:g} ms" if power < 3 else f"{10**(power - 3):g} s"
        out.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        out.append(
            f'<text x="{left - 8}" y="{at + 4:.1f}" text-anchor="end" fill="currentColor">{label}</text>'
        )
    step = max(1, round((end - start) / 10))
    for second in range(0, math.ceil(end - start), step):
        out.append(
            f'<text x="{x(start + second):.1f}" y="{height - bottom + 20}" text-anchor="middle"'
            f' fill="currentColor">{second}</text>'
        )
    out.append(
        f'<text x="{(left + width - right) / 2}" y="{height - 10}" text-anchor="middle"'
        f' fill="currentColor">seconds since the client\'s first reply</text>'
    )
    for t, latency, _ in replies:
        out.append(f'<circle class="dot" cx="{x(t):.1f}" cy="{y(latency):.1f}" r="2.2"/>')
    out.append(
        f'<line class="kill" x1="{x(kill):.1f}" x2="{x(kill):.1f}" y1="{top}" y2="{height - bottom}"'
        f' stroke-width="1.5"/>'
    )
    out.append(
        f'<text class="killt" x="{x(kill) - 6:.1f}" y="{top + 14}" text-anchor="end">host killed</text>'
    )
    if resumed is not None:
        out.append(
            f'<line class="kill" x1="{x(resumed):.1f}" x2="{x(resumed):.1f}" y1="{top}"'
            f' y2="{height - bottom}" stroke-dasharray="4 4"/>'
        )
        out.append(
            f'<text class="killt" x="{x(resumed) + 6:.1f}" y="{height - bottom - 8}">standby runs it</text>'
        )
    out.append("</svg>")
    return "\n".join(out) + "\n"
