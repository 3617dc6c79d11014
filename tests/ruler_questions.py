"""Made-up question data in the formats of SQuAD 2.0 and HotpotQA, whose answers can be read from the paragraphs."""

from __future__ import annotations

import json
from pathlib import Path

from evaluation.ruler_data import Draw, haystack_sentences, vocabulary

ARTICLES, PARAGRAPHS = 30, 6


def write_questions(folder: Path) -> dict[str, Path]:
    """Both files, as ``Ruler(questions=...)`` takes them: "The harvest of NOUN was counted by ADJECTIVE-NOUN in YEAR." """
    draw, sentences = Draw("questions"), haystack_sentences()
    adjectives, nouns = vocabulary()
    subjects = iter(draw.shuffled(nouns))
    articles, items = [], []
    for a in range(ARTICLES):
        paragraphs = []
        for p in range(PARAGRAPHS):
            subject, answer = next(subjects), f"{draw.choice(adjectives)}-{draw.choice(nouns)}"
            fact = f"The harvest of {subject} was counted by {answer} that year."
            start = draw.below(len(sentences) - 4)
            text = " ".join([*sentences[start : start + 2], fact, *sentences[start + 2 : start + 4]])
            question = f"Who counted the harvest of {subject}?"
            aliases = [{"text": answer}, {"text": f"by {answer}"}, {"text": answer}]
            open_ones = {"id": f"{a}-{p}", "question": question, "answers": aliases, "is_impossible": False}
            closed = {"id": f"{a}-{p}-no", "question": "Who counted nothing?", "answers": [], "is_impossible": True}
            paragraphs.append({"context": text, "qas": [closed, open_ones]})
        articles.append({"title": f"article {a}", "paragraphs": paragraphs})
        context = [[f"{a} title {p}", [f"{one['context']} "]] for p, one in enumerate(paragraphs)]
        qa = paragraphs[2]["qas"][1]
        item = {"_id": f"h{a}", "question": qa["question"], "answer": qa["answers"][0]["text"], "context": context}
        items.append({**item, "supporting_facts": [[f"{a} title 2", 0], [f"{a} title 4", 1]]})
        items.append({**items[-1], "_id": f"yes{a}", "answer": "yes"})
    squad, hotpot = folder / "squad.json", folder / "hotpot.json"
    squad.write_text(json.dumps({"version": "v2.0", "data": articles}))
    hotpot.write_text(json.dumps(items))
    return {"ruler_qa_squad": squad, "ruler_qa_hotpot": hotpot}
