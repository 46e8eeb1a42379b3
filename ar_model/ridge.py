"""Ridge classifier whose penalty is chosen by leaving groups out, in closed form.

The prediction of ridge regression is linear in the targets: Y_hat = H Y. If a block g of samples (a group) is left out, the
residuals of the block are (I - H_gg)^-1 (Y - Y_hat)_g, so no model is fitted again. For blocks of one sample, this is the known
leave-one-out formula (Golub, Heath and Wahba 1979).

Legend: N samples, M samples of a group, F features, C classes, A penalties, R rank.
"""

import numpy as np
from sklearn.preprocessing import StandardScaler

PENALTIES_A = 10.0 ** np.arange(-1, 7)


class RidgeProbe:
    """Ridge classifier on standardised features, fitted to targets of +1 (the label of the sample) and -1, with an intercept.

    Args:
        x_NF: features of the training samples.
        y_N: labels of any dtype that NumPy can sort.
        groups_N: integers, equal for samples that are left out together; None leaves out single samples. With a single
            group, single samples are left out, too.

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
        share_AR = square_R / (square_R + PENALTIES_A[:, None])
        target_RC = u_NR.T @ y_NC
        left_out_ANC = _left_out(u_NR, share_AR, y_NC, share_AR[..., None] * target_RC, groups_N) + self._mean_C
        scores_A = (left_out_ANC.argmax(2) == label_N).mean(1)
        best = int(scores_A.argmax())
        self.score = float(scores_A[best])
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


def _left_out(
    u_NR: np.ndarray, share_AR: np.ndarray, y_NC: np.ndarray, fitted_ARC: np.ndarray, groups_N: np.ndarray | None
) -> np.ndarray:
    """Return the predictions for each sample of a model that was fitted without the group of the sample, (A, N, C).

    Args:
        share_AR: eigenvalues of the hat matrix, apart from the intercept's.
        fitted_ARC: predictions of the full model in the coordinates of `u_NR`.
    """
    samples = len(u_NR)
    residual_ANC = y_NC - u_NR @ fitted_ARC
    if groups_N is None or len(np.unique(groups_N)) == 1:
        hat_AN = share_AR @ u_NR.T**2 + 1 / samples
        return y_NC - residual_ANC / (1 - hat_AN)[..., None]
    order_N = np.argsort(groups_N, kind="stable")
    starts = np.flatnonzero(np.diff(groups_N[order_N])) + 1
    predicted_ANC = np.empty_like(residual_ANC)
    for rows_M in np.split(order_N, starts):
        u_MR = u_NR[rows_M]
        hat_AMM = (u_MR * share_AR[:, None]) @ u_MR.T + 1 / samples
        predicted_ANC[:, rows_M] = y_NC[rows_M] - np.linalg.solve(
            np.eye(len(rows_M)) - hat_AMM, residual_ANC[:, rows_M]
        )
    return predicted_ANC
