"""From a budget to a recipe: the error and cost of each layer at each rank and width, and the choice of least error
within the budget.
"""

from norton_timm.search.budget import find_spec
from norton_timm.search.sensitivity import weighted_nmse
from norton_timm.search.trade_off import TradeOffPoint, plot_trade_off, trade_off

__all__ = [
    'TradeOffPoint', 'find_spec', 'plot_trade_off', 'trade_off', 'weighted_nmse',
]  # fmt: skip
