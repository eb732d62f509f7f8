"""The assignment problem: each row gets a column of its own, at the least cost in all."""

import numpy as np

from router.expert_map import Int64Array
from router.placement.request import Float64Array


def cheapest_matching(cost: Float64Array) -> Int64Array:
    """The column of each row: [num_rows].

    cost: [num_rows, num_columns], finite, at least as many columns as rows. Shortest augmenting paths (Jonker and
    Volgenant 1987), one row after another, each step over all columns at once.
    """
    num_rows, num_columns = cost.shape
    assert num_rows <= num_columns, "a row would be left over"
    row_price, column_price = np.zeros(num_rows), np.zeros(num_columns + 1)
    row_of = np.full(num_columns + 1, -1)  # of each column; the last, made up, column is where a path starts
    for row in range(num_rows):
        row_of[num_columns] = row
        column, came_from = num_columns, np.full(num_columns, num_columns)
        distance, is_done = np.full(num_columns, np.inf), np.zeros(num_columns + 1, dtype=np.bool_)
        while row_of[column] >= 0:
            is_done[column] = True
            current = row_of[column]
            reduced = cost[current] - row_price[current] - column_price[:-1]
            nearer = ~is_done[:-1] & (reduced < distance)
            distance[nearer], came_from[nearer] = reduced[nearer], column
            nearest = int(np.where(is_done[:-1], np.inf, distance).argmin())
            step = distance[nearest]
            row_price[row_of[is_done]] += step
            column_price[is_done] -= step
            distance[~is_done[:-1]] -= step
            column = nearest
        while column != num_columns:  # turns the path round
            row_of[column] = row_of[came_from[column]]
            column = int(came_from[column])
    columns = np.empty(num_rows, dtype=np.int64)
    is_taken = row_of[:-1] >= 0
    columns[row_of[:-1][is_taken]] = np.flatnonzero(is_taken)
    return columns
