"""The builders of the fine-tuning files and the mapping from texts to items, in plain Python: what ours are timed against.

Written for the benchmarks, from the formats that the stages document; the builders' files are checked byte for byte
against the published digests, so both sides do the same work.
"""
import json


def save(value, path):
    with open(path, "w", encoding="utf-8") as f:
        json.dump(value, f, ensure_ascii=False, indent=2)


def load(path):
    with open(path, encoding="utf-8") as f:
        return json.load(f)


def build_id2meta(records, out):
    id2meta = {}
    with open(records, encoding="utf-8") as f:
        for line in f:
            record = json.loads(line)
            record["summary_words"] = [word.replace(" ", "-") for word in record["summary_words"]]
            id2meta[record["id"]] = record
    save(id2meta, out)


def tid(words):
    return "[" + ", ".join(words) + "]"


def build_meta2tid(id2meta, prompts, out):
    text = prompts["sft_meta2tid"]
    samples = []
    for record in load(id2meta).values():
        lines = {
            "{title_line}": "Title: %s" % record["title"] if record.get("title") else "",
            "{description_line}": "Description: %s" % record["description"] if record.get("description") else "",
        }
        filled = text["input"]
        for place, line in lines.items():
            filled = filled.replace(place, line)
        samples.append({"instruction": text["instruction"], "input": filled, "output": tid(record["summary_words"])})
    save(samples, out)


def shown(record):
    return "Item text ID: %s Title: %s.\n" % (tid(record["summary_words"]), record["title"] if "title" in record else "None")


def build_rec(id2meta, sequences, prompts, out):
    id2meta, instruction = load(id2meta), prompts["sft_rec"]["instruction"]
    samples, item_id2tid = [], {}
    bare = lambda words: [word.strip("[]") for word in words]
    with open(sequences, encoding="utf-8") as f:
        for line in f:
            user, *items = line.split()
            items = items[-20:]
            records = []
            for item in items:
                record = id2meta.get(item)
                if record is None or len(record["summary_words"]) != 5 or not all(record["summary_words"]):
                    break
                item_id2tid.setdefault(item, bare(record["summary_words"]))
                records.append(record)
            if len(records) < len(items) or len(items) < 3:
                continue
            words = [word for record in records for word in bare(record["summary_words"])]
            first, train = records[0], records[1:-2]
            samples.append({
                "instruction": instruction,
                "input": "Item text ID: %s Title: %s.\n" % (tid(words[:5]), first["title"] if "title" in first else "None"),
                "output": "".join(map(shown, train)),
                "metadata": {
                    "user_id": user,
                    "total_items": len(items),
                    "total_words": 5 + 5 * len(train),
                    "input_word_count": 5,
                    "output_word_count": 5 * len(train),
                },
                "item_id_list": items,
                "item_id_len": len(items),
                "all_summary_words": words,
                "valid_ground_truth_id": items[-2],
                "test_ground_truth_id": items[-1],
                "valid_ground_truth_tid": words[-10:-5],
                "test_ground_truth_tid": words[-5:],
                "valid_ground_truth_msg": records[-2],
                "test_ground_truth_msg": records[-1],
            })
    tid2item_id = {}
    for item, words in item_id2tid.items():
        tid2item_id.setdefault(",".join(words), []).append(item)
    save(item_id2tid, out + "/item_id2tid.json")
    save(tid2item_id, out + "/tid2item_id.json")
    save(samples, out + "/sft_rec.json")
    simple = [{name: sample[name] for name in ("instruction", "input", "output")} for sample in samples]
    save(simple, out + "/sft_rec_simplified.json")


def build_collaborative(id2meta, similar, prompts, out):
    id2meta, text = load(id2meta), prompts["sft_collaborative"]
    samples = []
    with open(similar, encoding="utf-8") as f:
        next(f)
        for line in f:
            anchor, *others = line.split()
            if anchor not in id2meta:
                continue
            found = [id2meta[other] for other in others[:5] if other in id2meta]
            if not found:
                continue
            record = id2meta[anchor]
            item = "Item text ID: %s Title: %s. Description: %s. \n" % (
                tid(record["summary_words"]), record.get("title", ""), record.get("description", ""))
            answer = lambda n, r: "%d. Item text ID: %s Title: %s.\n" % (n, tid(r["summary_words"]), r.get("title", ""))
            samples.append({
                "instruction": text["instruction"],
                "input": text["input"].replace("{item_line}", item).replace("{count}", str(len(found))),
                "output": "\n\n".join(answer(n, r) for n, r in enumerate(found, 1)),
            })
    save(samples, out)


class Mapping:
    """From the texts that a model wrote to items: known TIDs as they are, others by words they share with TIDs."""

    def __init__(self, tid2item_id):
        self.items = tid2item_id
        self.holders = {}
        for key in tid2item_id:
            for word in key.split(","):
                self.holders.setdefault(word.strip().lower(), []).append(key)

    def nearest(self, words):
        scores = {}
        for i, word in enumerate(words):
            for known, keys in self.holders.items():
                if word == known:
                    score = 1.0
                elif word in known or known in word:
                    score = 0.8
                else:
                    continue
                for key in keys:
                    scores[key] = scores.get(key, 0) + score * (1 / (i + 1))
        return self.items[max(scores, key=scores.get)][:1] if scores else []

    def user(self, texts, wanted=20):
        queries = list(dict.fromkeys(text[1:-1] for text in texts))
        found = []
        for query in queries:
            words = query.split(", ")
            found += self.items.get(",".join(words)) or self.nearest(words)
        found = list(dict.fromkeys(found))[:wanted]
        if len(found) < wanted:
            for query in queries:
                found += self.nearest(query.split(", "))
            found = list(dict.fromkeys(found))[:wanted]
        return found
