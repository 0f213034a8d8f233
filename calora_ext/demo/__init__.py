"""``calora demo``: the whole story on the model that ships with the package. plan: how much of it; story: what is measured;
report: the folder that is written. ``assets/SOURCES.md`` says where the model, its LoRA and the texts come from."""

from .plan import FULL, QUICK, Plan
from .report import REPORT, write_report
from .story import ASSETS, tell

__all__ = ["ASSETS", "FULL", "QUICK", "REPORT", "Plan", "tell", "write_report"]
