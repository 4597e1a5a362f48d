"""From a budget to a recipe. This room estimates the error and the cost of each layer at each rank and width, and
chooses the recipe with the least error within the budget.
"""

from norton_timm.search.budget import find_spec
from norton_timm.search.sensitivity import weighted_nmse
from norton_timm.search.trade_off import TradeOffPoint, plot_trade_off, trade_off

__all__ = [
    'TradeOffPoint', 'find_spec', 'plot_trade_off', 'trade_off', 'weighted_nmse',
]  # fmt: skip
