from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megagpt.data.corpus import Corpus, Split, open_corpus, open_mixture, verify
from megagpt.data.tables import canonical_json, sha256_of
from megagpt.data.tokenizer import train_tokenizer
from megagpt.errors import UserError
from tests.data.conftest import MakeCorpus, random_documents

DOCUMENTS = random_documents(seed=1, count=40, longest=60)
TOKENS = np.concatenate(DOCUMENTS)
STARTS = np.cumsum([0, *(len(document) for document in DOCUMENTS)])


@pytest.fixture
def corpus(make_corpus: MakeCorpus) -> Corpus:
    return make_corpus("corpus", DOCUMENTS, DOCUMENTS[:3])


@pytest.fixture
def split(corpus: Corpus) -> Split:
    return corpus.split("train")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_any_range_is_read_and_its_seams_found_across_shards(split: Split, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(TOKENS) - 1))
    stop = data.draw(st.integers(start + 1, len(TOKENS)))
    np.testing.assert_array_equal(split.read(start, stop), TOKENS[start:stop])
    assert split.seams(start, stop) == [int(seam) - start for seam in STARTS if start < seam < stop]


def test_a_split_knows_its_documents(split: Split) -> None:
    starts, lengths = (np.concatenate(parts) for parts in zip(*split.document_spans(), strict=True))
    assert (split.tokens, split.documents) == (len(TOKENS), len(DOCUMENTS))
    assert starts.tolist() == STARTS[:-1].tolist()
    assert lengths.tolist() == [len(document) for document in DOCUMENTS]


def test_the_fingerprint_follows_the_content_and_not_the_folder(make_corpus: MakeCorpus) -> None:
    one, same = make_corpus("one", DOCUMENTS), make_corpus("same", DOCUMENTS)
    other = make_corpus("other", DOCUMENTS[:-1])
    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_an_empty_split_is_refused_when_it_is_asked_for(make_corpus: MakeCorpus) -> None:
    with pytest.raises(UserError, match=r"has an empty heldout split"):
        make_corpus("corpus", DOCUMENTS).split("heldout")


def edit(corpus: Corpus, **changes: object) -> None:
    path = corpus.folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_folder_without_a_manifest_is_no_corpus(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a corpus: it has no manifest\.json"):
        open_corpus(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", "\xff"])
def test_a_broken_manifest_is_refused(corpus: Corpus, content: str) -> None:
    (corpus.folder / "manifest.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"manifest\.json is not a corpus's manifest"):
        open_corpus(corpus.folder)


def test_a_manifest_edited_by_hand_is_noticed(corpus: Corpus) -> None:
    edit(corpus, vocabulary=99)
    with pytest.raises(UserError, match=r"manifest\.json was changed after it was written"):
        open_corpus(corpus.folder)


def test_a_manifest_of_another_version_is_refused(corpus: Corpus) -> None:
    edit(corpus, format="megagpt corpus 2")
    with pytest.raises(UserError, match=r"is of the format 'megagpt corpus 2'; this megagpt reads 'megagpt corpus 1'"):
        open_corpus(corpus.folder)


def test_a_manifest_without_a_field_is_refused_though_its_fingerprint_is_right(corpus: Corpus) -> None:
    body = {key: value for key, value in corpus.manifest.body().items() if key != "counts"}
    content = {**body, "fingerprint": sha256_of(canonical_json(body))}
    (corpus.folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"is not a corpus's manifest: KeyError\('counts'\)"):
        open_corpus(corpus.folder)


@pytest.mark.parametrize("suffix", ["tar", "index"])
def test_a_missing_or_short_shard_is_noticed_when_the_corpus_is_opened(corpus: Corpus, suffix: str) -> None:
    path = corpus.folder / f"train-00001-00.{suffix}"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"train-00001-00\.{suffix} has [\d,]+ bytes where the manifest says"):
        open_corpus(corpus.folder)
    path.unlink()
    with pytest.raises(UserError, match=rf"lacks train-00001-00\.{suffix}"):
        open_corpus(corpus.folder)


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_in_an_index_is_noticed_before_a_token_is_read(corpus: Corpus) -> None:
    flip(corpus.folder / "train-00000-00.index", -1)
    with pytest.raises(UserError, match=r"train-00000-00\.index is not the index that the manifest describes"):
        corpus.split("train").read(0, 5)


def test_a_tokenizer_that_was_exchanged_is_noticed(corpus: Corpus) -> None:
    assert corpus.tokenizer().end_of_text == 0
    (corpus.folder / "tokenizer.json").write_text(train_tokenizer(["a a a aa aa"], 260).definition)
    with pytest.raises(UserError, match="is not the tokenizer that the corpus was built with"):
        corpus.tokenizer()


def test_verify_finds_what_is_broken_and_repairs_an_index(corpus: Corpus) -> None:
    folder = corpus.folder
    assert verify(folder, repair=False) == []
    (folder / "train-00000-00.index").unlink()
    flip(folder / "train-00001-00.index", 300)
    assert [problem.partition(" is ")[2] for problem in verify(folder, repair=False)] == [
        "missing or broken; --repair makes it from the tar."
    ] * 2
    assert verify(folder, repair=True) == verify(folder, repair=False) == []
    flip(folder / "train-00002-00.tar", 512 * 3 + 130)
    (folder / "train-00003-00.tar").unlink()
    tar = folder / "train-00004-00.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    (folder / "tokenizer.json").unlink()
    problems = verify(folder, repair=True)
    assert [problem.replace(str(folder), "F") for problem in problems] == [
        "there is no tokenizer at F/tokenizer.json.",
        "F/train-00002-00.tar does not have the sha256 of the manifest; broken blocks: 0.",
        "F/train-00003-00.tar is missing.",
        "F/train-00004-00.tar has 9,728 bytes where the manifest says 10,240.",
    ]


def test_a_mixture_is_opened_in_its_order(make_corpus: MakeCorpus) -> None:
    one, two = make_corpus("one", DOCUMENTS), make_corpus("two", DOCUMENTS[:5])
    opened = open_mixture({str(two.folder): 1, str(one.folder): 3})
    assert [corpus.fingerprint for corpus in opened] == [two.fingerprint, one.fingerprint]


def test_a_bad_mixture_is_refused(make_corpus: MakeCorpus) -> None:
    one, same = make_corpus("one", DOCUMENTS), make_corpus("same", DOCUMENTS)
    with pytest.raises(UserError, match=r"data\.mixture is empty"):
        open_mixture({})
    with pytest.raises(UserError, match=r"data\.mixture: .*one has the weight 0; it must be at least 1"):
        open_mixture({str(one.folder): 0})
    with pytest.raises(UserError, match=r"same and .*one are the same corpus"):
        open_mixture({str(one.folder): 1, str(same.folder): 1})


def test_corpora_of_different_tokenizers_do_not_mix(make_corpus: MakeCorpus) -> None:
    one, two = make_corpus("one", DOCUMENTS), make_corpus("two", DOCUMENTS[:5])
    body = {**two.manifest.body(), "tokenizer_sha256": "0" * 64}
    content = {**body, "fingerprint": sha256_of(canonical_json(body))}
    (two.folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"two was built with another tokenizer than .*one") as caught:
        open_mixture({str(one.folder): 1, str(two.folder): 1})
    assert caught.value.remedy == f"Build it again with --tokenizer {one.folder}."
