//! Stage `import_items`: any catalogue and any users' sequences, made into clean ones, with an account of what was
//! dropped.
//!
//! `catalogue` reads items (JSON Lines, a JSON object or array, CSV, TSV) and `clean` mends their fields; `users`
//! reads sequences (`user item item …`, or interactions as JSON Lines, CSV or TSV); `report` keeps the account.
//!
//! Of two items with one id the first is kept. Items without any text cannot be named and are left out, and with them
//! their place in sequences. Users left with fewer than `min_items` items are left out.

mod catalogue;
mod clean;
mod report;
mod table;
mod users;

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use self::report::Account;
use crate::{
    Artifact, ParamIssue, Ports, Stage, StageContext, StageError,
    artifact::{items, python_json},
    stage::{Input, Output},
};

pub struct ImportItems;

/// Parameters of `import_items`.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Params {
    /// Users with fewer known items are left out.
    pub min_items: usize,
    /// Whether items without title, description and categories are left out.
    pub require_text: bool,
    /// Whether anything that would be left out is an error instead.
    pub strict: bool,
    /// The field that holds an item's id; if not set, `id`, `item_id`, `asin` and the like are tried.
    pub id_field: Option<String>,
    /// Fields to rename, from their name in the catalogue to ours (`title`, `description`, `categories`, `brand`,
    /// `domain`).
    pub rename: BTreeMap<String, String>,
}

impl Default for Params {
    fn default() -> Self {
        Self { min_items: 3, require_text: true, strict: false, id_field: None, rename: BTreeMap::new() }
    }
}

impl Stage for ImportItems {
    const KIND: &'static str = "import_items";
    const SUMMARY: &'static str = "any catalogue and sequences, cleaned, with an account of what was dropped";
    type Params = Params;

    fn ports(_: &Params) -> Ports {
        Ports::new(
            [
                Input::required("items", Artifact::Any, "a catalogue: JSON Lines, a JSON object or array, CSV or TSV"),
                Input::required(
                    "sequences",
                    Artifact::Any,
                    "`user item item …` lines, or interactions as JSON Lines or CSV",
                ),
            ],
            [
                Output::new("items", Artifact::Items, "items.jsonl", "the clean catalogue"),
                Output::new("sequences", Artifact::Sequences, "sequential_data.txt", "users' known items"),
                Output::new(
                    "report",
                    Artifact::Json,
                    "import_report.json",
                    "what was dropped and mended, with examples",
                ),
            ],
        )
    }

    fn check(params: &Params) -> Vec<ParamIssue> {
        let mut issues = Vec::new();
        if params.min_items == 0 {
            issues.push(ParamIssue::new("min_items", "must be at least 1"));
        }
        for (from, to) in &params.rename {
            if params.rename.contains_key(to) {
                issues.push(ParamIssue::new(format!("rename.{from}"), format!("`{to}` is renamed itself")));
            }
        }
        issues
    }

    fn run(params: &Params, cx: &mut StageContext) -> Result<(), StageError> {
        let items_path = cx.input("items")?.to_owned();
        let mut of_items = Account::new(&items_path, params.strict);
        let items = catalogue::read(params, &items_path, &mut of_items)?;
        cx.check_stop()?;

        let known = items.iter().map(|item| item.id.as_str()).collect();
        let sequences_path = cx.input("sequences")?.to_owned();
        let mut of_sequences = Account::new(&sequences_path, params.strict);
        let sequences = users::read(params, &sequences_path, &known, &mut of_sequences)?;

        items::write(cx.output("items")?, &items)?;
        write(cx.output("sequences")?, sequences.as_bytes())?;
        let mut report = Vec::new();
        python_json::write_pretty(&mut report, &json!({"items": of_items, "sequences": of_sequences}), 0);
        write(cx.output("report")?, &report)?;

        for line in of_items.lines("items").into_iter().chain(of_sequences.lines("sequences")) {
            cx.warn(line);
        }
        cx.info(format!(
            "{} of {} items, {} of {} users",
            of_items.kept, of_items.read, of_sequences.kept, of_sequences.read
        ));
        Ok(())
    }
}

fn write(path: &std::path::Path, content: &[u8]) -> Result<(), StageError> {
    std::fs::write(path, content).map_err(|e| StageError::io("write", path, e))
}

#[cfg(test)]
mod tests {
    use crate::testing::{Bench, Ran, shared_data};
    use serde_json::{Value, json};

    fn run(items: &str, sequences: &str, params: Value) -> Result<Ran, crate::StageError> {
        Bench::new().input("items", items).input("sequences", sequences).run("import_items", params)
    }

    fn error(items: &str, sequences: &str, params: Value) -> String {
        run(items, sequences, params).unwrap_err().to_string()
    }

    const SEQUENCES: &str = "u a b a\n";

    #[test]
    fn every_form_of_catalogue_gives_the_same_items() {
        let expected = "{\"id\": \"a\", \"title\": \"A & A\"}\n{\"id\": \"b\", \"title\": \"B\"}\n";
        for items in [
            "{\"asin\": \"a\", \"title\": \"A &amp; A\"}\n\n{\"asin\": \"b\", \"title\": \"B\"}\n",
            "{\"a\": {\"title\": \"A &amp; A\"}, \"b\": {\"title\": [\"B\"]}}",
            "[{\"item_id\": \"a\", \"title\": \"A &amp; A\"}, {\"item_id\": \"b\", \"title\": \"['B']\"}]",
            "id,title\na,A &amp; A\nb,B\n",
            "id\ttitle\na\tA &amp; A\nb\tB\n",
        ] {
            assert_eq!(run(items, SEQUENCES, json!({})).unwrap().text("items"), expected, "{items}");
        }
    }

    #[test]
    fn every_form_of_sequences_gives_the_same_users() {
        let items = "{\"a\": {\"title\": \"A\"}, \"b\": {\"title\": \"B\"}}";
        for sequences in [
            "u a b a\n",
            "u a\nv b\nu b a\n",
            "user_id,item_id,timestamp\nu,a,3\nu,a,20\nu,b,10\n",
            "{\"user\": \"u\", \"item\": \"b\", \"time\": 2}\n{\"user\": \"u\", \"item\": \"a\", \"time\": 1}\n{\"user\": \"u\", \"item\": \"a\", \"time\": 3}\n",
            "date,asin,user\n2024-02-01,b,u\n2024-01-01,a,u\n2024-03-01,a,u\n",
        ] {
            assert_eq!(run(items, sequences, json!({})).unwrap().text("sequences"), "u a b a\n", "{sequences}");
        }
    }

    #[test]
    fn what_is_dropped_is_counted_with_examples() {
        let items = "{\"id\": \"a\", \"title\": \"A\"}\n{\"id\": \"a\", \"title\": \"A2\"}\nnonsense\n{\"title\": \"no id\"}\n\
                     {\"id\": \"mute\", \"title\": \" \", \"description\": []}\n{\"id\": \"b\", \"description\": \"B\"}\n";
        let ran = run(items, "u a b a mute x\nshort a\n", json!({})).unwrap();
        let report = ran.json("report");
        assert_eq!((&report["items"]["read"], &report["items"]["kept"]), (&json!(6), &json!(2)));
        for (reason, example) in [
            ("repeated_id", "line 2: item `a`"),
            ("not_a_record", "line 3: not valid JSON: expected ident at line 1 column 2"),
            ("no_usable_id", "line 4: a record with the fields `title`"),
            ("no_text", "line 5: item `mute`"),
        ] {
            assert_eq!(report["items"]["dropped"][reason], json!({"count": 1, "examples": [example]}));
        }
        let dropped = &report["sequences"]["dropped"];
        assert_eq!(dropped["unknown_item"]["count"], 2);
        assert_eq!(dropped["too_short_user"]["examples"], json!(["line 2: user `short` with 1 items"]));
        assert_eq!(ran.text("sequences"), "u a b a\n");
        assert!(ran.text("items").contains("\"A\"") && !ran.text("items").contains("A2"));
    }

    #[test]
    fn strict_makes_every_drop_an_error_with_its_place() {
        let strict = json!({"strict": true});
        let items = "{\"id\": \"a\", \"title\": \"A\"}\n{\"id\": \"b\", \"title\": \"B\"}\n";
        assert!(run(items, SEQUENCES, strict.clone()).is_ok());
        let message = error(items, "u a b a\nv a b c\n", strict.clone());
        assert!(message.ends_with(":2: item `c` of user `v` (unknown item)"), "{message}");
        let message = error("{\"id\": \"a\"}\n", SEQUENCES, strict);
        assert!(message.ends_with(":1: item `a` (no text)"), "{message}");
    }

    #[test]
    fn files_without_anything_usable_are_errors() {
        for (items, sequences, message) in [
            ("", SEQUENCES, "items: the file is empty"),
            ("{\"a\": {\"title\": \"A\"},\n", SEQUENCES, "items:2: not a catalogue (object id → fields): EOF"),
            ("{\"a\": {}}", SEQUENCES, "no item can be used (items: 1 left out: no text (first: item `a`))"),
            ("just text", SEQUENCES, "items:1: neither JSON nor a table with a header"),
            ("{\"a\": {\"title\": \"A\"}}", "", "sequences: holds no sequence"),
            ("{\"a\": {\"title\": \"A\"}}", "u x y z\n", "no user can be used"),
        ] {
            let error = error(items, sequences, json!({}));
            assert!(error.contains(message), "{error}");
        }
    }

    #[test]
    fn fields_can_be_renamed_and_the_id_field_named() {
        let items = "[{\"id\": \"wrong\", \"code\": \"a\", \"name\": \"A\"}, {\"code\": \"b\", \"name\": \"B\"}]";
        let ran = run(items, SEQUENCES, json!({"id_field": "code", "rename": {"name": "title"}})).unwrap();
        assert!(ran.text("items").starts_with("{\"id\": \"a\", \"title\": \"A\""), "{}", ran.text("items"));
    }

    #[test]
    fn a_real_catalogue_passes_whole() {
        let Some(data) = shared_data() else { return };
        let industrial = data.join("data/industrial");
        let ran = Bench::new()
            .input_path("items", industrial.join("industrial.item.json"))
            .input_path("sequences", industrial.join("sequential_data.txt"))
            .run("import_items", json!({}))
            .unwrap();
        let report = ran.json("report");
        assert_eq!((&report["items"]["read"], &report["items"]["kept"]), (&json!(3686), &json!(3686)));
        let items = crate::artifact::items::read(ran.path("items")).unwrap();
        let titles = |text: &str| items.iter().filter(|i| i.title().is_some_and(|t| t.contains(text))).count();
        assert_eq!(titles("&ndash;") + titles("&Uuml;"), 0);
        assert!(titles("TÜRLEN") > 0);
        assert!(items.iter().filter_map(|i| i.description()).all(|d| !d.starts_with("['")));
    }
}
