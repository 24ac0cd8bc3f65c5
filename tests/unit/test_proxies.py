"""Clusters that stand in for groups: how they are found, whom they are given to, and what is said of them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix

from agglom import assemble, proxies
from agglom.core import groups
from agglom.core.types import Dims, Features
from agglom.data.manifest import Manifest
from agglom.errors import ConfigError, DataError
from agglom.job import Balance, Data, Proxies
from agglom.runtime import World
from agglom.survey import Pool, Survey

ROWS, WIDTH = 60, 5


def blobs(rows=ROWS, centres=3, seed=0):
    """Directions around a few axes, of any length; and which axis."""
    draw = np.random.default_rng(seed)
    axis_N = np.arange(rows) % centres
    x_ND = np.eye(WIDTH)[axis_N] + 0.1 * draw.normal(size=(rows, WIDTH))
    return (x_ND * draw.uniform(1, 50, size=(rows, 1))).astype(np.float32), axis_N


def unit(x_ND):
    return x_ND.astype(np.float64) / np.sqrt((x_ND.astype(np.float64) ** 2).sum(1, keepdims=True))


def test_the_best_of_several_fits_of_scikit_learn_by_size():
    x_ND = np.random.default_rng(1).normal(size=(200, WIDTH))
    centre_KD, ari_P = proxies.fit(x_ND, 4, 3, 7)
    starts = np.random.SeedSequence(7).generate_state(3)
    fits = [KMeans(4, n_init=1, random_state=int(start)).fit(unit(x_ND)) for start in starts]
    best = min(fits, key=lambda one: one.inertia_)
    images = np.bincount(best.predict(unit(x_ND)))
    np.testing.assert_allclose(centre_KD, best.cluster_centers_[np.argsort(-images)])
    assert len({round(one.inertia_, 6) for one in fits}) > 1
    pairs = [(0, 1), (0, 2), (1, 2)]
    assert ari_P.tolist() == [adjusted_rand_score(fits[i].labels_, fits[j].labels_) for i, j in pairs]
    found = np.bincount(proxies.nearest(x_ND, centre_KD))
    assert found.tolist() == sorted(images, reverse=True)


def test_clear_clusters_are_found_from_every_start_whatever_the_lengths():
    x_ND, axis_N = blobs()
    centre_KD, ari_P = proxies.fit(x_ND, 3, 5, 0)
    assert adjusted_rand_score(axis_N, proxies.nearest(x_ND, centre_KD)) == 1
    assert ari_P.tolist() == [1.0] * 10
    np.testing.assert_allclose(proxies.fit(1024 * x_ND, 3, 5, 0)[0], centre_KD, atol=1e-12)


@given(st.integers(0, 2**70), st.integers(1, 20), st.integers(1, 6))
def test_nearest_is_that_of_the_distances(seed, rows, clusters):
    draw = np.random.default_rng(seed)
    x_ND, centre_KD = draw.normal(size=(rows, WIDTH)).astype(np.float32), draw.normal(size=(clusters, WIDTH))
    distance_NK = np.linalg.norm(unit(x_ND)[:, None] - centre_KD[None], axis=2)
    np.testing.assert_array_equal(proxies.nearest(x_ND, centre_KD), distance_NK.argmin(1))


def test_what_is_not_finite_is_in_no_cluster():
    x_ND = np.ones((3, 2), np.float32)
    x_ND[1, 0], x_ND[2, 1] = np.nan, np.inf
    assert proxies.nearest(x_ND, np.eye(2)).tolist() == [0, -1, -1]


def test_fewer_different_images_than_clusters():
    x_ND = np.repeat(np.random.default_rng(0).normal(size=(3, WIDTH)), 10, axis=0)
    x_ND *= np.arange(1, 31)[:, None]
    with pytest.raises(DataError, match=r"balance.proxies.clusters: 4 clusters .* the 30 train .* have 3 different"):
        proxies.fit(x_ND, 4, 2, 0)
    assert len(proxies.fit(x_ND, 3, 2, 2**40)[0]) == 3


def of_patients(draw, rows):
    group_N, cluster_N = (draw.integers(0, most, rows) for most in (3, 4))
    return group_N, cluster_N, draw.integers(0, max(1, rows // 3), rows)


@given(st.integers(0, 1000), st.integers(2, 40))
def test_agreement_is_that_of_scikit_learn(seed, rows):
    group_N, cluster_N, patient_N = of_patients(np.random.default_rng(seed), rows)
    found = proxies.agreement(group_N, cluster_N, patient_N, seed)
    assert found["nmi"] == normalized_mutual_info_score(group_N, cluster_N)
    assert found["ari"] == adjusted_rand_score(group_N, cluster_N)
    assert found["purity"] == pytest.approx(contingency_matrix(group_N, cluster_N).max(0).sum() / rows)
    assert found["largest"] == np.bincount(group_N).max() / rows
    assert found["largest"] - 1e-9 <= found["chance"] <= found["chance_hi"] + 1e-9 <= 1 + 1e-9
    assert found == proxies.agreement(group_N, cluster_N, patient_N, seed)


def test_by_chance_is_what_a_permutation_of_images_shows_where_each_patient_has_one():
    draw = np.random.default_rng(0)
    group_N, cluster_N = draw.integers(0, 2, 300), draw.integers(0, 8, 300)
    found = proxies.agreement(group_N, cluster_N, np.arange(300), 0)
    shuffled = [contingency_matrix(group_N, draw.permutation(cluster_N)).max(0).sum() / 300 for _ in range(400)]
    assert found["chance"] == pytest.approx(np.mean(shuffled), abs=4 * np.std(shuffled) / np.sqrt(proxies.SHUFFLES))
    assert found["purity"] < found["chance_hi"]
    assert found["chance"] > found["largest"]


def test_clusters_that_tell_patients_do_not_tell_their_groups():
    """Every cluster is a patient, so its images are of one group: those dealt out anew over patients are, too."""
    patient_N = np.repeat(np.arange(4), 25)
    found = proxies.agreement(patient_N % 2, (patient_N + 1) % 4, patient_N, 0)
    assert (found["purity"], found["chance"], found["largest"]) == (1, 1, 0.5)


# ── In a run ──


SPLIT_N = np.array((["train"] * 4 + ["val", "test"]) * 10)
SEX = tuple([None, "F", None, "M", "F", None] * 10)


class Cut(Exception):
    """Nothing may be fitted again."""


def made(tmp_path, *, group="sex", probe_images=20):
    """A run whose survey has all of val and test and half of train, and that survey."""
    x_ND, axis_N = blobs()
    manifest = Manifest(
        path=tmp_path / "table.csv",
        images=tuple(map(str, range(ROWS))),
        patient_N=np.arange(ROWS),
        patients=tuple(map(str, range(ROWS))),
        split_N=SPLIT_N,
        label_NL=np.zeros((ROWS, 0), np.float32),
        labels=(),
        attributes={
            **{"sex": SEX, "axis": tuple("abc"[axis] for axis in axis_N), "same": ("x",) * ROWS},
            **{"several": ("x;y", "y") * 30, "rare": ("u", "v", *[None] * 58)},
        },
        separators={"several": ";"},
        digest="",
    )
    balance = Balance(kind="group_dro", group=group, proxies=Proxies(teacher="dino", clusters=3, seeds=2))
    data = Data(manifest="table.csv", groups=("axis", "sex*axis", "same", "several", "rare"))
    evaluate = SimpleNamespace(probe_images=probe_images, fvu_images=5)
    run = assemble.Run(
        job=SimpleNamespace(balance=balance, data=data, evaluate=evaluate, seed=0),
        base=tmp_path,
        out=tmp_path,
        world=World(0, 1, torch.device("cpu")),
        manifest=manifest,
        plan=SimpleNamespace(evaluate_size=(8, 8)),
        spaces={"sex": groups.encode("sex", manifest.attributes)},
        teachers={},
        stop=None,
    )
    rows_N = proxies.chosen_rows(run)[0]
    pool = Pool(torch.from_numpy(x_ND[rows_N]), None, (0, 0))
    return run, Survey(rows_N, rows_N[:0], {"dino": pool}), x_ND, axis_N


@pytest.fixture
def encodes(monkeypatch):
    """The rows that are encoded besides, and what of them, in chunks of 3; the identity of every run."""
    asked = []

    def arrange(x_ND):
        def encoded(run, names, rows_N, size):
            asked.append((names, rows_N.tolist(), size))
            for start in range(0, len(rows_N), 3):
                mine = rows_N[start : start + 3]
                yield mine, {"dino": Features(torch.from_numpy(x_ND[mine]), None)}

        monkeypatch.setattr(proxies, "encoded", encoded)
        return asked

    monkeypatch.setattr(assemble.Run, "identity", property(lambda run: {"seed": str(run.job.seed)}))
    return arrange


def test_annotated_rows_keep_their_group_and_the_others_get_a_cluster(tmp_path, encodes):
    run, surveyed, x_ND, axis_N = made(tmp_path)
    asked = encodes(x_ND)
    changed, found = proxies.added(run, surveyed)
    space, sex = changed.balance_space, run.spaces["sex"]
    assert (space.name, space.values) == (
        "sex, else clusters of dino",
        ("F", "M", "cluster 1", "cluster 2", "cluster 3"),
    )
    known_N = sex.index_N >= 0
    assert torch.equal(space.index_N[known_N], sex.index_N[known_N])
    train_N, seen_N = SPLIT_N == "train", np.isin(np.arange(ROWS), surveyed.rows_N)
    # What is annotated with the group and not evaluated needs no cluster, so no teacher sees it.
    missing = np.flatnonzero(train_N & ~seen_N & ~known_N.numpy())
    assert asked == [(["dino"], missing.tolist(), (8, 8))]
    assert len(missing) > 3
    assert (space.index_N[train_N] >= 0).all()
    new_N = ~known_N.numpy() & (train_N | seen_N)
    assert adjusted_rand_score(space.index_N[new_N], axis_N[new_N]) == 1
    told = found.proxies
    assert sum(told["n_grouped"]) == (train_N & ~known_N.numpy()).sum()
    assert sum(told["n_train"]) == (train_N & (seen_N | ~known_N.numpy())).sum()
    assert told["n_fitted"] == 20
    assert (told["stability"], told["stability_lo"], told["fits"], told["attribute"]) == (1, 1, 2, "sex")
    assert found.readouts is surveyed.readouts


def test_without_an_attribute_everybody_is_in_a_cluster(tmp_path, encodes):
    run, surveyed, x_ND, _ = made(tmp_path, group=None, probe_images=1000)
    asked = encodes(x_ND)
    changed, found = proxies.added(run, surveyed)
    assert changed.balance_space.name == "clusters of dino"
    assert changed.balance_space.values == ("cluster 1", "cluster 2", "cluster 3")
    assert (changed.balance_space.index_N >= 0).all()
    assert asked == [(["dino"], [], (8, 8))]
    assert found.proxies["n_train"] == found.proxies["n_grouped"]
    assert "sex" not in [one["attribute"] for one in found.proxies["agreement"]]


def test_without_proxies_nothing_changes(tmp_path):
    run, surveyed, *_ = made(tmp_path)
    plain = SimpleNamespace(**vars(run) | {"job": SimpleNamespace(balance=Balance(kind="group_dro", group="sex"))})
    assert proxies.added(plain, surveyed) == (plain, surveyed)


def test_agreement_with_every_group_that_is_reported(tmp_path, encodes):
    run, surveyed, x_ND, axis_N = made(tmp_path)
    encodes(x_ND)
    table = {one["attribute"]: one for one in proxies.added(run, surveyed)[1].proxies["agreement"]}
    assert list(table) == ["axis", "sex*axis", "same", "several", "rare", "sex"]
    assert {name: one["why"] for name, one in table.items() if one["why"]} == {
        "same": "one group only",
        "several": "an image may be in several of its groups",
        "rare": "fewer images than clusters",
    }
    assert all(np.isnan(table[name][key]) for name in ("same", "several", "rare") for key in proxies.MEASURES)
    axis = table["axis"]
    assert (axis["n_images"], axis["purity"], axis["ari"]) == (len(surveyed.rows_N), 1, pytest.approx(1))
    assert axis["chance_hi"] < 0.8
    known = [row for row in surveyed.rows_N if SEX[row]]
    assert table["sex"]["n_images"] == table["sex*axis"]["n_images"] == len(known)
    assert table["sex"]["nmi"] == pytest.approx(
        normalized_mutual_info_score([SEX[row] for row in known], axis_N[known]), abs=1e-9
    )


def test_a_second_start_reads_the_same_clusters(tmp_path, encodes, monkeypatch):
    run, surveyed, x_ND, _ = made(tmp_path)
    asked = encodes(x_ND)
    first, found = proxies.added(run, surveyed)
    bits = (tmp_path / "proxies.safetensors").read_bytes()

    def cut(*_):
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(proxies, "fit", cut)
        again, read = proxies.added(run, surveyed)
        assert torch.equal(again.proxy.index_N, first.proxy.index_N)
        # Compared as text, since NaN is no NaN.
        assert str(read.proxies) == str(found.proxies)
        assert len(asked) == 1
        # Of another job, then broken.
        other = made(tmp_path)[0]
        other.job.seed = 1
        with pytest.raises(Cut):
            proxies.added(other, surveyed)
        (tmp_path / "proxies.safetensors").write_bytes(bits[:40])
        with pytest.raises(Cut):
            proxies.added(run, surveyed)
    proxies.added(run, surveyed)
    assert (tmp_path / "proxies.safetensors").read_bytes() == bits


def test_a_row_whose_summary_is_not_finite_is_named(tmp_path, encodes):
    run, surveyed, x_ND, _ = made(tmp_path)
    row = next(row for row in range(ROWS) if SPLIT_N[row] == "train" and not SEX[row] and row not in surveyed.rows_N)
    x_ND[row, 1] = np.nan
    encodes(x_ND)
    with pytest.raises(DataError, match=rf"teachers.dino: its summary .* not finite; .* data row {row + 1} of .*table"):
        proxies.added(run, surveyed)


@pytest.mark.parametrize(
    ("teacher", "value", "message"),
    [
        ({"dims": Dims(None, 4), "serves": None}, "F", r"balance.proxies.teacher: 'dino' has no summary"),
        ({"dims": Dims(4, 4), "serves": "men"}, "F", r"balance.proxies.teacher: 'dino' is a specialist"),
        ({"dims": Dims(4, 4), "serves": None}, "cluster 2", r"balance.proxies: sex has a value 'cluster 2'"),
    ],
)
def test_what_cannot_be_clustered_is_refused_at_the_start(tmp_path, teacher, value, message):
    run, *_ = made(tmp_path)
    run.teachers["dino"] = SimpleNamespace(**teacher)
    run.spaces["sex"] = groups.encode("sex", {"sex": [value, "M"]})
    with pytest.raises(ConfigError, match=message):
        assemble._check_proxies(run)


@pytest.mark.parametrize("group", [None, "sex", "sex*age"])
def test_clusters_are_never_named_by_an_attribute_alone(group):
    over = Balance(group=group, proxies=Proxies(teacher="dino")).over
    assert over != group
    assert "clusters of dino" in over
    assert Balance(group=group).over == group
