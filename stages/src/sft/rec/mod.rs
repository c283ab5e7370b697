//! Stage `sft_rec`: from users' sequences to training samples, the two TID maps and the held-out targets.
//!
//! A user's last `max_items` items are taken; the last of them is the test target, the one before it the validation
//! target, the rest is the training history, to which `with_valid` adds the validation target. `users` decides who is kept, `write` puts samples together.
//!
//! | | reference | fixed |
//! |---|---|---|
//! | `sft`: users with three items | a sample with an empty answer | no sample (text), but still held out |
//! | a history's only item (`compact`) | – | a sample of that item |
//! | the maps | items in order of first appearance in the sequences, targets included, users that were dropped half-way too | every item with a valid TID, in the catalogue's order, as `generate` may answer |
//! | square brackets in words | removed from the first item and the maps only | removed everywhere |
//! | titles | see `rec_text` | see `rec_text` |
//! | a user on two lines | two users | an error |

mod users;
mod write;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use self::{users::Users, write::Parts};
use super::rec_text::Format;
use crate::{
    Artifact, Compat, ParamIssue, Ports, Stage, StageContext, StageError,
    artifact::{Id2Meta, text},
    prompts::Prompts,
    stage::{Input, Output},
    threads,
};

pub struct SftRec;

/// What becomes of a sequence with an item that is not in the catalogue or has no valid TID.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum UnknownItems {
    /// The user is left out whole, as published.
    #[default]
    DropUser,
    /// The item is left out; the user stays if enough items do.
    DropItem,
    /// The stage fails and names the item.
    Error,
}

/// Parameters of `sft_rec`.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Params {
    /// `reference` reproduces the published script's files byte for byte.
    pub compat: Compat,
    /// `text` has an instruction and titles, as published; `compact` is five words an item and nothing else.
    pub format: Format,
    /// Latest items of a user that are used, the two targets included.
    pub max_items: usize,
    /// Users with fewer usable items are left out.
    pub min_items: usize,
    /// Whether samples go on to the validation target: for the model that ranks the test items, once another one, trained
    /// without, has fixed all settings. What is held out stays as it is.
    pub with_valid: bool,
    /// What becomes of sequences with items that cannot be named.
    pub unknown_items: UnknownItems,
    /// Whether to write `records` too: every sample with its ids, words and whole target records. Large; always
    /// written under `compat: reference`.
    pub records: bool,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            compat: Compat::Fixed,
            format: Format::Text,
            max_items: 20,
            min_items: 3,
            with_valid: false,
            unknown_items: UnknownItems::DropUser,
            records: false,
        }
    }
}

impl Params {
    fn writes_records(&self) -> bool {
        self.records || self.compat.is_reference()
    }
}

impl Stage for SftRec {
    const KIND: &'static str = "sft_rec";
    const SUMMARY: &'static str = "training samples, TID maps and held-out targets from users' sequences";
    type Params = Params;

    fn ports(params: &Params) -> Ports {
        let mut outputs = vec![
            Output::new("sft", Artifact::Sft, "sft_rec.json", "one sample a user: instruction, input, output"),
            Output::new("item_id2tid", Artifact::ItemId2tid, "item_id2tid.json", "words of each item"),
            Output::new("tid2item_id", Artifact::Tid2itemId, "tid2item_id.json", "items of each TID"),
            Output::new("holdout", Artifact::Holdout, "holdout.jsonl", "each user's history and two targets"),
        ];
        if params.writes_records() {
            outputs.push(Output::new(
                "records",
                Artifact::Json,
                "sft_rec_records.json",
                "samples with ids, words and whole target records",
            ));
        }
        Ports::new(
            [
                Input::required("id2meta", Artifact::Id2meta, "items with their TIDs"),
                Input::required("sequences", Artifact::Sequences, "users' items, oldest first"),
                Input::optional("prompts", Artifact::Prompts, "prompt texts in place of the built-in ones"),
            ],
            outputs,
        )
    }

    fn check(params: &Params) -> Vec<ParamIssue> {
        let mut issues = Vec::new();
        if params.min_items < 3 {
            issues.push(ParamIssue::new("min_items", "at least 3: a history and two targets"));
        }
        if params.max_items < params.min_items {
            issues.push(ParamIssue::new("max_items", "must not be less than `min_items`"));
        }
        if params.with_valid && params.compat.is_reference() {
            issues.push(ParamIssue::new("with_valid", "`compat: reference` trains without the validation targets"));
        }
        if params.with_valid && params.records {
            issues.push(ParamIssue::new("records", "records are of samples without the validation targets"));
        }
        if params.format == Format::Compact {
            if params.compat.is_reference() {
                issues.push(ParamIssue::new("format", "the published format is `text`").help("or use `compat: fixed`"));
            }
            if params.records {
                issues.push(ParamIssue::new("records", "records are written with `format: text` only"));
            }
        }
        if params.compat.is_reference() && params.unknown_items != UnknownItems::DropUser {
            issues.push(ParamIssue::new("unknown_items", "`compat: reference` drops the user"));
        }
        issues
    }

    fn run(params: &Params, cx: &mut StageContext) -> Result<(), StageError> {
        let prompts = Prompts::load(cx.optional_input("prompts"))?;
        let id2meta = Id2Meta::read(cx.input("id2meta")?)?;
        let path = cx.input("sequences")?.to_owned();
        let sequences = text::read(&path)?;
        let users = Users::select(params, &path, &sequences, &id2meta)?;
        if !users.dropped.is_empty() {
            cx.warn(users.dropped.summary());
        }
        if users.kept.is_empty() {
            return Err(StageError::input(
                path,
                format!("no user has {} usable items ({})", params.min_items, users.dropped.summary()),
            )
            .help(users.dropped.advice()));
        }
        cx.check_stop()?;

        let pool = threads::pool(cx)?;
        let parts = pool.install(|| Parts::render(params, &id2meta));
        let mapped = match params.compat {
            Compat::Reference => users.appeared.clone(),
            Compat::Fixed => (0..id2meta.len()).filter(|&i| id2meta.records()[i].has_valid_tid()).collect(),
        };
        let records = params.writes_records().then(|| cx.output("records")).transpose()?;
        let [sft, item_id2tid, tid2item_id, holdout] =
            ["sft", "item_id2tid", "tid2item_id", "holdout"].map(|port| cx.output(port));
        let [sft, item_id2tid, tid2item_id, holdout] = [sft?, item_id2tid?, tid2item_id?, holdout?];
        // The records are three times as long as everything else: whoever is done with that helps to render them.
        let (recorded, samples) = pool.join(
            || records.map_or(Ok(()), |path| write::records(path, &prompts, &users, &id2meta, &parts)),
            || {
                let samples = write::samples(params, sft, &prompts, &users, &parts)?;
                write::item_id2tid(item_id2tid, &id2meta, &mapped)?;
                write::tid2item_id(tid2item_id, &id2meta, &mapped)?;
                write::holdout(holdout, &users, &id2meta, &parts)?;
                Ok::<_, StageError>(samples)
            },
        );
        recorded?;
        let samples = samples?;
        cx.check_stop()?;
        cx.info(format!("{} users held out, {samples} samples", users.kept.len()));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::{Bench, Ran, shared_data};
    use serde_json::{Value, json};

    fn id2meta() -> String {
        let mut items = serde_json::Map::new();
        for i in 1..=9 {
            let words = if i == 9 { json!(["x", "", "y"]) } else { json!([format!("[w{i}]"), "b", "c", "d", "e"]) };
            let mut item = json!({"id": i.to_string(), "title": format!("T{i}"), "summary_words": words});
            if i == 4 {
                item["domain"] = "Books".into();
            }
            items.insert(i.to_string(), item);
        }
        Value::Object(items).to_string()
    }

    fn run(sequences: &str, params: Value) -> Result<Ran, crate::StageError> {
        Bench::new().input("id2meta", id2meta()).input("sequences", sequences).run("sft_rec", params)
    }

    #[test]
    fn fixed_text_samples_leave_the_targets_out() {
        let ran = run("u 1 2 3 4\nv 5 6 7\nw 1 99 2 3\n", json!({})).unwrap();
        let samples = ran.json("sft");
        assert_eq!(samples.as_array().unwrap().len(), 1, "a history of one item has nothing to answer");
        assert_eq!(samples[0]["input"], "Item text ID: [w1, b, c, d, e] Title: T1.\n");
        assert_eq!(samples[0]["output"], "Item text ID: [w2, b, c, d, e] Title: T2.\n");
        let holdout = ran.lines("holdout");
        assert_eq!(
            holdout[0],
            json!({"user": "u", "history": ["1", "2"], "valid": "3", "test": "4", "group": "2", "domain": "Books"})
        );
        assert_eq!(holdout[1], json!({"user": "v", "history": ["5"], "valid": "6", "test": "7", "group": "1"}));
        assert_eq!(ran.json("item_id2tid").as_object().unwrap().len(), 8, "every item with a valid TID");
        assert_eq!(ran.json("tid2item_id")["w8,b,c,d,e"], json!(["8"]));
        assert!(!ran.outputs.contains_key("records"));
        assert_eq!(ran.logs()[0], "1 users left out: 1 for an unknown item (first: `99`, line 3)");
    }

    #[test]
    fn held_out_lines_are_what_their_type_writes() {
        let odd = id2meta().replace("\"3\"", "\"3\\\"\\u0001\"").replace("Books", "B\\\"\\u0002ö");
        let sequences = "\"u\\\u{1}é\u{7f} 1 2 3\"\u{1} 4\nv 5 6 7\n";
        let ran = Bench::new().input("id2meta", odd).input("sequences", sequences).run("sft_rec", json!({})).unwrap();
        let lines: Vec<String> = ran.text("holdout").lines().map(str::to_owned).collect();
        assert_eq!(lines.len(), 2);
        for line in lines {
            let held: crate::artifact::Holdout = serde_json::from_str(&line).unwrap();
            assert_eq!(serde_json::to_string(&held).unwrap(), line);
        }
        assert!(ran.text("holdout").contains("B\\\"\\u0002ö"), "{}", ran.text("holdout"));
    }

    #[test]
    fn compact_samples_are_lines_of_words() {
        let ran = run("u 1 2 3 4\nv 5 6 7\n", json!({"format": "compact"})).unwrap();
        assert_eq!(
            ran.json("sft"),
            json!([
                {"instruction": "", "input": "", "output": "w1 b c d e\nw2 b c d e\n"},
                {"instruction": "", "input": "", "output": "w5 b c d e\n"}
            ])
        );
    }

    #[test]
    fn samples_may_go_on_to_the_validation_target() {
        for format in ["text", "compact"] {
            let run = |with_valid: bool| {
                run("u 1 2 3 4\nv 5 6 7\n", json!({"format": format, "with_valid": with_valid})).unwrap()
            };
            let (ran, without) = (run(true), run(false));
            assert_eq!(ran.lines("holdout"), without.lines("holdout"));
            let samples = ran.json("sft");
            assert_eq!(samples.as_array().unwrap().len(), 2);
            let text = samples[1]["input"].as_str().unwrap().to_owned() + samples[1]["output"].as_str().unwrap();
            assert!(text.contains("w5") && text.contains("w6") && !text.contains("w7"), "{text}");
        }
        assert!(run("u 1 2 3\n", json!({"with_valid": true, "compat": "reference"})).is_err());
    }

    #[test]
    fn only_the_latest_items_count() {
        let ran = run("u 99 1 2 3 4 5\n", json!({"max_items": 4})).unwrap();
        assert_eq!(ran.lines("holdout")[0]["history"], json!(["2", "3"]));
    }

    #[test]
    fn items_that_cannot_be_named_can_be_left_out_or_refused() {
        let sequences = "u 1 99 2 9 3 4\n";
        let ran = run(sequences, json!({"unknown_items": "drop_item"})).unwrap();
        assert_eq!(ran.lines("holdout")[0]["history"], json!(["1", "2"]));
        assert_eq!(
            ran.logs()[0],
            "2 items left out of sequences: 1 unknown (first: `99`, line 1), 1 without a valid TID (first: `9`, line 1)"
        );
        let error = run(sequences, json!({"unknown_items": "error"})).err().unwrap().to_string();
        assert!(error.ends_with(":1: item `99` is not in the catalogue"), "{error}");
        let error = run("u 1 2 3 9\n", json!({})).err().unwrap().to_string();
        assert!(
            error.contains("no user has 3 usable items (1 users left out: 1 for an item without a valid TID"),
            "{error}"
        );
    }

    #[test]
    fn a_user_on_two_lines_is_an_error() {
        let error = run("u 1 2 3 4\n\nu 5 6 7\n", json!({})).err().unwrap().to_string();
        assert!(error.ends_with(":3: user `u` stands on line 1 already"), "{error}");
    }

    #[test]
    fn the_published_files_come_out_byte_for_byte() {
        let Some(data) = shared_data() else { return };
        let quirks = data.join("golden/quirks");
        let ran = Bench::new()
            .input_path("id2meta", quirks.join("expected/id2meta.json"))
            .input_path("sequences", quirks.join("sequential_data.txt"))
            .input_path("prompts", data.join("data/reference_prompts.json"))
            .run("sft_rec", json!({"compat": "reference"}))
            .unwrap();
        for (port, file) in [
            ("sft", "sft_rec_simplified.json"),
            ("records", "sft_rec.json"),
            ("item_id2tid", "item_id2tid.json"),
            ("tid2item_id", "tid2item_id.json"),
        ] {
            let expected = std::fs::read_to_string(quirks.join("expected").join(file)).unwrap();
            assert!(ran.text(port) == expected, "{file} differs");
        }
    }
}
