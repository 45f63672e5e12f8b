"""Amounts as people read them."""


def bytes_in_words(count: float) -> str:
    """`1.2 GB`: powers of a thousand, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} PB"


def duration_in_words(seconds: float) -> str:
    """`1.2 s`, `45 s`, `12 min`, `3.4 h`, `2.5 d`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, hours = seconds / 60, seconds / 3600
    if minutes < 100:
        return f"{minutes:.0f} min"
    return f"{hours:.1f} h" if hours < 72 else f"{hours / 24:.1f} d"
