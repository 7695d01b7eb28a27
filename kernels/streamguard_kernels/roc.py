"""The ROC of weighted texts, for many weightings of one order: the inner loop of a bootstrap."""

from __future__ import annotations

import numpy as np

from streamguard_kernels.compiled import compiled


@compiled
def roc_figures(weights, order, last, harmful, fprs, auroc, recall):
    """AUROC and recall at given false positive rates, for each row of weights.

    One pass over the texts a row: 2 ns a text where numpy's cumulative sums take 45.

    weights  float64[num_rows, num_texts], whole numbers >= 0.
    order    int64[num_texts], texts from the highest score to the lowest.
    last     bool[num_texts], by place in that order: the last of those with an equal score.
    harmful  bool[num_texts], by place in that order.
    fprs     float64[num_rates].
    auroc    float64[num_rows], out: P(harmful above benign) + P(equal) / 2.
    recall   float64[num_rows, num_rates], out: the highest share of the harmful weight that a
             threshold halts with at most that share of the benign.

    NaN where a label has no weight.
    """
    allowed = np.empty(len(fprs))
    for row in range(len(weights)):
        all_harmful, all_benign = 0.0, 0.0
        for at in range(len(order)):
            weight = weights[row, order[at]]
            if harmful[at]:
                all_harmful += weight
            else:
                all_benign += weight
        if all_harmful == 0 or all_benign == 0:
            auroc[row] = np.nan
            recall[row, :] = np.nan
            continue
        # The margin keeps 0.05 * 100 from being less than 5.
        allowed[:] = fprs * all_benign + 1e-9
        recall[row, :] = 0.0
        area, above, halted, passed = 0.0, 0.0, 0.0, 0.0
        benign = 0.0
        for at in range(len(order)):
            weight = weights[row, order[at]]
            if harmful[at]:
                halted += weight
            else:
                benign += weight
            if last[at]:
                area += benign * (above + halted)
                passed += benign
                above, benign = halted, 0.0
                for rate in range(len(fprs)):
                    if passed <= allowed[rate]:
                        recall[row, rate] = halted / all_harmful
        auroc[row] = area / (2 * all_harmful * all_benign)
