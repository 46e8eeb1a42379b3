"""Ridge classifier whose penalty is chosen by leaving groups out, in closed form.

The prediction of ridge regression is linear in the targets: Y_hat = H Y. If a block g of samples (a group) is left out, the
residuals of the block are (I - H_gg)^-1 (Y - Y_hat)_g, so no model is fitted again. For blocks of one sample, this is the known
leave-one-out formula (Golub, Heath and Wahba 1979).

Legend: N samples, M samples of a group, F features, C classes, A penalties, R rank (in `_left_out` also rank + 1).
"""

import numpy as np
from sklearn.preprocessing import StandardScaler

from ar_model.folds import left_out_groups

PENALTIES_A = 10.0 ** np.arange(-1, 7)


class RidgeProbe:
    """Ridge classifier on standardised features, fitted to targets of +1 (the label of the sample) and -1, with an intercept.

    Args:
        x_NF: features of the training samples.
        y_N: labels of any dtype that NumPy can sort.
        groups_N: integers, equal for samples that are left out together (see `left_out_groups`).

    `score` is the accuracy on the samples that were left out, with the best penalty. It allows choosing a layer without held-out
    samples. Features are standardised with all training samples.
    """

    def __init__(self, x_NF: np.ndarray, y_N: np.ndarray, groups_N: np.ndarray | None = None) -> None:
        self.classes, label_N = np.unique(y_N, return_inverse=True)
        self._scaler = StandardScaler().fit(x_NF.astype(np.float64))
        x_NF = self._scaler.transform(x_NF.astype(np.float64))
        y_NC = 2.0 * np.eye(len(self.classes))[label_N] - 1
        self._mean_C = y_NC.mean(0)
        y_NC = y_NC - self._mean_C
        u_NR, square_R = _left_singular_vectors(x_NF)
        target_RC = u_NR.T @ y_NC
        left_out_N, counts_N = left_out_groups(y_N, groups_N)
        scores = []
        for penalty in PENALTIES_A:
            left_out_NC = _left_out(u_NR, square_R / (square_R + penalty), y_NC, left_out_N) + self._mean_C
            scores.append((left_out_NC.argmax(1) == label_N)[counts_N].mean())
        best = int(np.argmax(scores))
        self.score = float(scores[best])
        self._weights_FC = x_NF.T @ (u_NR @ (target_RC / (square_R + PENALTIES_A[best])[:, None]))

    def predict(self, x_NF: np.ndarray) -> np.ndarray:
        """Return the predicted labels (N,)."""
        decision_NC = self._scaler.transform(x_NF.astype(np.float64)) @ self._weights_FC + self._mean_C
        return self.classes[decision_NC.argmax(1)]


def _left_singular_vectors(x_NF: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the left singular vectors (N, R) of centred features and the squared singular values (R,), without zeros."""
    samples, features = x_NF.shape
    if samples <= features:
        square_R, u_NR = np.linalg.eigh(x_NF @ x_NF.T)
        kept_R = square_R > square_R[-1] * samples * np.finfo(float).eps
        return u_NR[:, kept_R], square_R[kept_R]
    square_R, v_FR = np.linalg.eigh(x_NF.T @ x_NF)
    kept_R = square_R > square_R[-1] * features * np.finfo(float).eps
    return x_NF @ (v_FR[:, kept_R] / np.sqrt(square_R[kept_R])), square_R[kept_R]


def _left_out(u_NR: np.ndarray, share_R: np.ndarray, y_NC: np.ndarray, groups_N: np.ndarray) -> np.ndarray:
    """Return the predictions for each sample of a model that was fitted without the group of the sample, (N, C).

    `share_R`: eigenvalues of the hat matrix, apart from the intercept's.
    """
    samples = len(u_NR)
    residual_NC = y_NC - (u_NR * share_R) @ (u_NR.T @ y_NC)
    # H = A A^T, with the intercept in the last column.
    a_NR = np.hstack([u_NR * np.sqrt(share_R), np.full((samples, 1), samples**-0.5)])
    order_N = np.argsort(groups_N, kind="stable")
    starts = np.flatnonzero(np.diff(groups_N[order_N])) + 1
    if len(starts) == samples - 1:
        return y_NC - residual_NC / (1 - np.square(a_NR).sum(1, keepdims=True))
    for rows_M in np.split(order_N, starts):
        a_MR, residual_MC = a_NR[rows_M], residual_NC[rows_M]
        if len(rows_M) <= a_MR.shape[1]:
            residual_NC[rows_M] = np.linalg.solve(np.eye(len(rows_M)) - a_MR @ a_MR.T, residual_MC)
        else:
            # The same by the identity of Woodbury.
            inner_RC = np.linalg.solve(np.eye(a_MR.shape[1]) - a_MR.T @ a_MR, a_MR.T @ residual_MC)
            residual_NC[rows_M] = residual_MC + a_MR @ inner_RC
    return y_NC - residual_NC
