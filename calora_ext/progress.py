"""Progress bars: on terminals, of what takes more than two seconds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

BAR_AFTER = 2.0  # seconds without one


def progress(items: Iterable | None, desc: str, unit: str, total: int | None = None, unit_scale: bool = False) -> Any:
    """A tqdm bar over items, or, without any, one to be moved by ``update()``. HF_HUB_DISABLE_PROGRESS_BARS turns it off."""
    from huggingface_hub.utils import tqdm

    return tqdm(items, desc=desc, unit=unit, total=total, delay=BAR_AFTER, disable=None, leave=False, dynamic_ncols=True, unit_scale=unit_scale)
