"""RULER's tasks, line by line: the whole prompt of small items, written by hand from the definition
(words and numbers that were drawn are filled in), then sizes, scores and what is refused."""

from __future__ import annotations

import json
import re
from random import Random

import numpy as np
import pytest
from spoken import Speaker

from kvlab.core import BadInput
from kvlab.eval import TASKS
from kvlab.eval.tasks import RULER, Protocol, VariableTracking, haystack, words
from kvlab.eval.tasks.documents import Hotpot, Squad
from kvlab.eval.tasks.fitting import dice
from kvlab.eval.tasks.fitting import drawn as drawn_items
from kvlab.eval.tasks.lists import CommonWords, FrequentWords, vocabulary
from kvlab.eval.tasks.niah import Niah, NiahMultikey3, NiahMultiquery, NiahSingle1, NiahSingle2

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KVLAB_CACHE", str(tmp_path / "cache"))


def drawn(task, units, number=0):
    prompt = task.prompt(units, dice(task, "item", number))
    [asked] = prompt.asked
    return prompt, asked


def test_single_1_line_by_line():
    prompt, asked = drawn(NiahSingle1(), 5)
    [value], key = asked.texts, asked.question.split(" for ")[1].split(" mentioned")[0]
    assert len(value) == 7 and value[0] != "0" and "-" in key
    lines = [NOISE] * 5
    lines.insert(prompt.context.splitlines().index(f"One of the special magic numbers for {key} is:"
                                                   f" {value}.") - 1,
                 f"One of the special magic numbers for {key} is: {value}.")  # fmt: skip
    assert prompt.context == (
        "A special magic number is hidden within the following text. Make sure to memorize it. I "
        "will quiz you about the number afterwards.\n" + "\n".join(lines) + "\n")
    assert asked.question == (
        f"What is the special magic number for {key} mentioned in the provided text?")
    assert asked.prefix == (
        f" The special magic number for {key} mentioned in the provided text is")
    assert prompt.blank == prompt.context.splitlines()[0] + "\n\n"


def test_multikey_3_is_needles_only():
    prompt, asked = drawn(NiahMultikey3(), 6)
    told = [line.removesuffix(".").split(" for ")[1].split(" is: ")
            for line in prompt.context.splitlines()[1:]]  # fmt: skip
    assert len(told) == 7 and all(len(x) == 36 and x[14] == "4" for pair in told for x in pair)
    key = asked.question.split(" for ")[1].split(" mentioned")[0]
    assert asked.texts == (dict(told)[key],) and "magic uuid for" in asked.question
    assert "magic uuids for" in prompt.context and "about the uuid afterwards" in prompt.context


def test_multiquery_hides_four_in_text(tmp_path):
    """The text is the file's first words; needles stand behind sentences; all four are asked."""
    essays = tmp_path / "essays.txt"
    essays.write_text(" ".join(f"This is sentence {n}.\n" for n in range(200)))
    task = NiahMultiquery(essays=str(essays))
    assert task.name == "niah_multiquery" and NiahMultiquery().name == "niah_multiquery-books"
    prompt, asked = drawn(task, 40)
    query = asked.question.removeprefix("What are all the special magic numbers for ")
    query = query.removesuffix(" mentioned in the provided text?")
    keys = query.replace(", and ", ", ").split(", ")
    assert len(keys) == 4 and query.count(", and ") == 1
    text = prompt.context
    assert text.startswith("Some special magic numbers are hidden within the following text.")
    for key, value in zip(keys, asked.texts):
        needle = f"One of the special magic numbers for {key} is: {value}."
        assert needle in text
        text = text.replace(needle, "")
    left = " ".join(text.split("afterwards.\n")[1].split())
    assert left == " ".join(f"This is sentence {n}." for n in range(10))


def test_the_table_of_needles():
    """haystack, key, value, K, V, Q as in RULER's synthetic.yaml."""
    table = {
        "niah_single_1": ("noise", "words", "numbers", 1, 1, 1),
        "niah_single_2-books": ("text", "words", "numbers", 1, 1, 1),
        "niah_single_3-books": ("text", "words", "uuids", 1, 1, 1),
        "niah_multikey_1-books": ("text", "words", "numbers", 4, 1, 1),
        "niah_multikey_2": ("needle", "words", "numbers", 1, 1, 1),
        "niah_multikey_3": ("needle", "uuids", "uuids", 1, 1, 1),
        "niah_multivalue-books": ("text", "words", "numbers", 1, 4, 1),
        "niah_multiquery-books": ("text", "words", "numbers", 4, 1, 4),
    }
    made = [cls() for cls in RULER if issubclass(cls, Niah)]
    assert table == {t.name: (t.hay, t.key, t.value, t.keys, t.values, t.queries) for t in made}
    assert {t.generates for t in made} == {128}
    assert [(c.name, c.generates, c.right) for c in RULER if not issubclass(c, Niah)] == [
        ("vt", 30, "contains_all"), ("cwe", 120, "contains_all"), ("fwe", 50, "contains_all"),
        ("qa_1", 32, "contains_any"), ("qa_2", 32, "contains_any"),
    ]  # fmt: skip


def test_variable_tracking_line_by_line():
    task = VariableTracking()
    prompt, asked = drawn(task, 6)
    a, b, c, d, e = asked.texts
    assert all(len(x) == 5 and x.isupper() for x in asked.texts) and len(set(asked.texts)) == 5
    value = asked.question.split("value ")[1].split()[0]
    assert asked.prefix == (" Answer: According to the chain(s) of variable assignment in the text "
                            f"above, 5 variables are assigned the value {value}, they are: ")
    worked, _, body = prompt.context.rpartition("Memorize and track the chain(s)")
    chain = [f"VAR {a} = {value}", f"VAR {b} = VAR {a} ", f"VAR {c} = VAR {b} ",
             f"VAR {d} = VAR {c} ", f"VAR {e} = VAR {d} "]  # fmt: skip
    head, *lines = body.split("\n\n")[0], *body.split("\n\n")[1].removesuffix("\n").split("\n")
    assert head == " of variable assignment hidden in the following text."
    assert [x for x in lines if x != NOISE] == chain and lines.count(NOISE) == 6
    # the worked example: three letters, the same places in every item, its answer behind it
    assert worked.endswith("\n\n") and worked.startswith("Memorize and track the chain(s)")
    names = worked.split()[-5:]
    assert all(len(x) == 3 for x in names) and f"VAR {names[1]} = VAR {names[0]} \n" in worked
    other = drawn(task, 6, number=1)[0].context
    shape = [[len(line) for line in text.split("\nQuestion")[0].splitlines()]
             for text in (worked, other)]  # fmt: skip
    assert shape[0] == shape[1] and names != other.split("they are:")[1].split()[:5]


def test_common_words_line_by_line():
    task = CommonWords(Protocol(lengths=[4096]))
    prompt, asked = drawn(task, 13)
    before = ("Below is a numbered list of words. In these words, some appear more often than "
              "others. Memorize the ones that appear most often.\n")  # fmt: skip
    ask = ("Question: What are the 10 most common words in the above list? Answer: The top 10 words"
           " that appear most often in the list are:")  # fmt: skip
    blank, worked, listed = prompt.context.split(before)
    assert not blank and asked.question + asked.prefix == ask
    example, answer = worked.split(f"\n{ask} ")
    counts = tally(listed.removesuffix("\n"))
    assert [counts[w] for w in asked.texts] == [30] * 10
    assert sorted(counts.values()) == [3] * 3 + [30] * 10
    counts, right = tally(example), [x.split(". ")[1] for x in numbers(answer.removesuffix("\n"))]
    assert len(counts) == 40 and len(right) == 10
    assert all(n == (10 if word in right else 3) for word, n in counts.items())
    short = drawn(CommonWords(Protocol(lengths=[2048])), 13)[0]
    assert sorted(tally(short.context.split(before)[2].removesuffix("\n")).values()) == (
        [1] * 3 + [6] * 10)


def numbers(text):
    """`1. a 2. b` in parts; words may have spaces."""
    parts = re.split(r"(?:^| )(?=\d+\. )", text)
    assert [p.split(". ")[0] for p in parts if p] == [str(n + 1) for n in range(len(parts) - (
        not parts[0]))]  # fmt: skip
    return [p for p in parts if p]


def tally(text):
    found = {}
    for part in numbers(text):
        word = part.split(". ", 1)[1]
        found[word] = found.get(word, 0) + 1
    return found


def test_frequent_words_fall_as_one_over_the_square():
    task = FrequentWords()
    task.room = 500  # tokens: a word for each 50
    prompt, asked = drawn(task, 200)
    text = prompt.context.removesuffix("\n").partition("frequently appeared coded words. ")[2]
    counts = {}
    for word in text.split(" "):
        counts[word] = counts.get(word, 0) + 1
    ranked = sorted(counts, key=counts.get, reverse=True)
    assert ranked[0] == "..." and tuple(ranked[1:4]) == asked.texts
    wanted = [int(200 / rank**2 * 6 / np.pi**2) for rank in range(1, 11)]
    assert [counts[w] for w in ranked] == [n for n in wanted if n]
    assert all(len(w) == 6 and w.islower() for w in ranked[1:])


SQUAD = {"data": [
    {"paragraphs": [
        {"context": "Paris is in France.", "qas": [
            {"question": "Where is Paris?", "is_impossible": False,
             "answers": [{"text": "France"}, {"text": "in France"}]},
            {"question": "Who is Paris?", "is_impossible": True, "answers": []}]},
        {"context": "Lyon is in France, too.", "qas": []}]},
    {"paragraphs": [{"context": f"Town {n} is in Italy.", "qas": []} for n in range(9)]},
]}  # fmt: skip


def test_squad_puts_its_article_first_then_any(tmp_path):
    file = tmp_path / "dev.json"
    file.write_text(json.dumps(SQUAD))
    task = Squad(path=str(file))
    assert [q.query for q in task.questions] == ["Where is Paris?"] and len(task.documents) == 11
    prompt, asked = drawn(task, 3)
    assert asked.texts == ("France", "in France")
    words_ = ("Answer the question based on the given documents. Only give me the answer and do not"
              " output any other words.\n\n")  # fmt: skip
    assert asked.question == f"{words_}Question: Where is Paris?" and asked.prefix == " Answer:"
    head = f"{words_}The following are given documents.\n\n"
    assert prompt.context.startswith(head) and prompt.context.endswith(".\n\n")
    documents = prompt.context.removeprefix(head).removesuffix("\n\n").split("\n\n")
    assert [d.split(":\n")[0] for d in documents] == ["Document 1", "Document 2", "Document 3"]
    texts = [d.split(":\n")[1] for d in documents]
    assert {"Paris is in France.", "Lyon is in France, too."} < set(texts)
    assert drawn(task, 1)[0].context.count("Document") == 1
    assert drawn(task, 25)[0].context.count("Town 4 ") >= 2, "documents come again"
    with pytest.raises(BadInput, match="eval.samples=20: .* holds 1 questions"):
        task.parts(Speaker())[0].items(Speaker(), None, 0)
    with pytest.raises(BadInput, match="eval.squad=null: qa_1 is made from SQuAD"):
        Squad()
    with pytest.raises(BadInput, match="is not HotpotQA"):
        Hotpot(path=str(tmp_path / "none.json"))


def test_hotpot_reads_title_and_sentences(tmp_path):
    row = {"question": "Same country?", "answer": "yes",
           "context": [["Paris", ["In France.", " Big."]], ["Lyon", ["In France."]]]}
    file = tmp_path / "hotpot.json"
    file.write_text(json.dumps([row]))
    prompt, asked = drawn(Hotpot(path=str(file)), 2)
    assert "Paris\nIn France. Big." in prompt.context and asked.texts == ("yes",)


# -- lengths, seeds, cache


@pytest.mark.parametrize("name", [c.name for c in RULER[:11]])
def test_prompt_and_answer_fill_the_length_and_items_are_kept(name):
    module, _, cls = TASKS[name].rpartition(".")
    length = 2600 if name in ("vt", "cwe") else 900  # these begin with a worked example
    task = next(c for c in RULER if c.__name__ == cls)(Protocol(lengths=[length], samples=2))
    speaker = Speaker()
    [part] = task.parts(speaker)
    items = part.items(speaker, None, seed=3)
    for item in items:
        [question] = item.questions
        total = len(item.context) + len(question.ids) + part.new_tokens
        assert 0.7 * length < total <= length, (name, total)
        said = speaker.tokenizer.decode([*item.context, *question.ids])
        assert said.startswith("<system>\nBe brief.</system>\n<user>\n")
        assert speaker.tokenizer.decode(question.ids[question.inside :]).startswith("</user>\n<ass")
        assert all(text in said for text in question.texts)
        assert not any(text in speaker.tokenizer.decode(item.blank) for text in question.texts)
    again = part.items(speaker, None, seed=3)
    assert all(np.array_equal(a.tokens(), b.tokens()) and a.questions[0].texts ==
               b.questions[0].texts for a, b in zip(items, again))  # fmt: skip
    drawn_anew = list(drawn_items(part, speaker.tokenizer, 3))
    assert [x.tokens().tolist() for x in drawn_anew] == [x.tokens().tolist() for x in items]
    other = part.items(speaker, None, seed=4)
    assert not np.array_equal(other[0].tokens(), items[0].tokens())


def test_items_are_the_same_everywhere():
    """No hash(), no order of sets: numbers and words of a seed, as they came on another machine."""
    assert words.number(7, Random("0 a")) == "8200912"
    assert words.uuid(Random("0 a")) == "3e093831-c463-48ce-9643-bbd66de09028"
    assert words.pair_of_words(Random("0 a")) == "knowledgeable-puritan"
    assert words.capitals(5, Random("0 a")) == "LTACY"
    assert dice(NiahSingle1(), "item", 0).random() == 0.810995706771808


def test_a_broken_file_of_items_is_drawn_again(tmp_path):
    task = NiahSingle1(Protocol(lengths=[600], samples=1))
    speaker = Speaker()
    [part] = task.parts(speaker)
    first = part.items(speaker, None, 0)
    [file] = (tmp_path / "cache" / "items").glob("*.npz")
    file.write_bytes(b"torn")
    assert np.array_equal(part.items(speaker, None, 0)[0].tokens(), first[0].tokens())
    assert file.stat().st_size > 100


def test_a_length_that_holds_nothing_is_refused():
    [part] = NiahSingle1(Protocol(lengths=[200])).parts(Speaker())
    with pytest.raises(BadInput, match="eval.lengths=200: niah_single_1 needs more tokens"):
        part.items(Speaker(), None, 0)


def test_words_without_wonderwords_are_refused(monkeypatch):
    monkeypatch.setattr(words, "find_spec", lambda name: None)
    words.word_list.cache_clear()
    with pytest.raises(BadInput, match=r"pip install 'kvlab\[tasks\]'"):
        words.word_list("noun")


def test_word_lists_are_those_of_wonderwords():
    assert [len(words.word_list(k)) for k in ("noun", "adjective", "verb")] == [6782, 910, 1041]
    assert len(vocabulary(0)) == 8166


def test_essays_are_split_into_sentences(tmp_path):
    file = tmp_path / "PaulGrahamEssays.json"
    file.write_text(json.dumps({"text": 'One.  "Two!" Three?\nfour. Five'}))
    assert haystack.sentences(5, str(file)) == ["One.", '"Two!"', "Three? four.", "Five"]
    assert haystack.sentences(7, str(file)) == [
        "One.", '"Two!"', "Three? four.", "Five One.", '"Two!"'], "from the start again"
    with pytest.raises(BadInput, match="eval.essays"):
        haystack.words(str(tmp_path / "none.txt"))


def test_a_longer_number_is_harder_to_copy():
    task = NiahSingle2(digits=64)
    assert len(drawn(task, 45)[1].texts[0]) == 64 and task.params()["digits"] == 64
    with pytest.raises(BadInput, match="task.digits=0"):
        NiahSingle2(digits=0)
