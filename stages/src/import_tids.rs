//! Stage `import_tids`: TIDs that somebody else made, in any of the published formats, as `tids`.
//!
//! Read are TID records (JSON Lines), `item_id2tid.json` (object id → words) and `id2meta.json` (object id → record),
//! told apart by their content. With a catalogue connected, its fields are added: a field that the TID file has and
//! that is not blank stays as it is there.

use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::{
    Artifact, Ports, Stage, StageContext, StageError,
    artifact::{Id2Meta, Item, TidRecord, items, text, tids},
    stage::{Input, Output},
};

pub struct ImportTids;

/// Parameters of `import_tids`: none.
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Params {}

impl Stage for ImportTids {
    const KIND: &'static str = "import_tids";
    const SUMMARY: &'static str = "published TIDs, in any of the published formats";
    type Params = Params;

    fn ports(_: &Params) -> Ports {
        Ports::new(
            [
                Input::required("tids", Artifact::Any, "TID records (JSON Lines), item_id2tid.json or id2meta.json"),
                Input::optional("items", Artifact::Items, "a catalogue, to add titles and other fields"),
            ],
            [Output::new("tids", Artifact::Tids, "tids.jsonl", "TID records")],
        )
    }

    fn run(_: &Params, cx: &mut StageContext) -> Result<(), StageError> {
        let mut imported = Id2Meta::default();
        let mut replaced = 0u64;
        for record in read(cx.input("tids")?)? {
            replaced += u64::from(imported.insert(record).is_some());
        }
        let (records, mut notes) = match cx.optional_input("items") {
            Some(path) => add_fields(&imported, &items::read(path)?),
            None => (imported.records().to_vec(), Vec::new()),
        };
        if replaced > 0 {
            notes.push(format!("{replaced} records had the id of an earlier one and replaced it"));
        }
        let invalid = records.iter().filter(|r| !r.has_valid_tid()).count();
        if invalid > 0 {
            notes.push(format!("{invalid} TIDs are not five words"));
        }
        for note in notes {
            cx.warn(note);
        }
        cx.info(format!("{} TIDs", records.len()));
        tids::write(cx.output("tids")?, &records)
    }
}

fn read(path: &Path) -> Result<Vec<TidRecord>, StageError> {
    let text = text::read(path)?;
    if text.trim().is_empty() {
        return Err(StageError::input(path, "the file is empty"));
    }
    let first = text.trim_start().lines().next().unwrap_or_default();
    let is_record = serde_json::from_str::<Map<String, Value>>(first).is_ok_and(|r| r.contains_key("summary_words"));
    if is_record {
        return tids::read(path);
    }
    let entries: Map<String, Value> =
        serde_json::from_str(&text).map_err(|e| text::json_error(path, &e, "TID records, item_id2tid or id2meta"))?;
    if entries.is_empty() {
        return Err(StageError::input(path, "holds no TID"));
    }
    let record = |(id, entry): (String, Value)| {
        let id = items::id_from(&Value::String(id))?;
        match entry {
            Value::Array(words) => TidRecord::new(id.clone(), fields(id.as_str(), words).into()),
            Value::Object(fields) => TidRecord::new(id, fields.into()),
            other => Err(format!("the TID of item `{id}` is {other}, not a list of words")),
        }
    };
    entries.into_iter().map(|entry| record(entry).map_err(|m| StageError::input(path, m))).collect()
}

fn fields(id: &str, words: Vec<Value>) -> Map<String, Value> {
    let answer = words.iter().map(|w| w.as_str().unwrap_or_default()).collect::<Vec<_>>().join(", ");
    let mut fields = Map::new();
    fields.insert("id".into(), json!(id));
    fields.insert("llm_output".into(), json!(format!("[{answer}]")));
    fields.insert("summary_words".into(), Value::Array(words));
    fields.insert("similar_item_ids".into(), json!([]));
    fields
}

/// Joins every record with its item: `id`, the item's fields, the record's own. Gives also what there is to warn of.
fn add_fields(imported: &Id2Meta, catalogue: &[Item]) -> (Vec<TidRecord>, Vec<String>) {
    let by_id: rustc_hash::FxHashMap<&str, &Item> = catalogue.iter().map(|item| (item.id.as_str(), item)).collect();
    let mut without_item = 0usize;
    let mut records = Vec::with_capacity(imported.len());
    for record in imported.records() {
        let Some(item) = by_id.get(record.id().as_str()) else {
            without_item += 1;
            records.push(record.clone());
            continue;
        };
        let mut fields = Map::new();
        fields.insert("id".into(), json!(record.id()));
        fields.extend(item.fields.iter().map(|(k, v)| (k.clone(), v.clone())));
        for (name, value) in record.fields().iter() {
            if record.text(name).is_some() || !fields.contains_key(name) {
                fields.insert(name.to_owned(), value.to_value());
            }
        }
        // The words are the record's, which has been checked.
        records.extend(TidRecord::new(record.id().clone(), fields.into()));
    }
    let with_tid = records.len() - without_item;
    let mut notes = Vec::new();
    if without_item > 0 {
        notes.push(format!("{without_item} TIDs are of items that the catalogue does not have"));
    }
    if catalogue.len() > with_tid {
        notes.push(format!("{} items of the catalogue have no TID", catalogue.len() - with_tid));
    }
    (records, notes)
}

#[cfg(test)]
mod tests {
    use crate::testing::{Bench, shared_data};
    use serde_json::json;

    #[test]
    fn all_published_formats_are_read() {
        let expected = json!({"id": "1", "llm_output": "[a, b]", "summary_words": ["a", "b"], "similar_item_ids": []});
        for tids in [
            json!({"1": ["a", "b"]}).to_string(),
            json!({"1": expected}).to_string(),
            expected.to_string(),
            format!("{expected}\n{expected}\n"),
        ] {
            let ran = Bench::new().input("tids", &tids).run("import_tids", json!({})).unwrap();
            assert_eq!(ran.lines("tids"), std::slice::from_ref(&expected), "{tids}");
        }
    }

    #[test]
    fn a_catalogue_adds_its_fields() {
        let tids = "{\"id\": \"1\", \"title\": \"\", \"brand\": \"mine\", \"summary_words\": [\"a\", \"b\", \"c\", \"d\", \"e\"]}\n\
                    {\"id\": \"2\", \"summary_words\": [\"a\", \"b\", \"c\", \"d\", \"e\"]}\n";
        let items = r#"{"1": {"title": "T", "brand": "theirs"}, "3": {"title": "U"}, "4": {}}"#;
        let ran = Bench::new().input("tids", tids).input("items", items).run("import_tids", json!({})).unwrap();
        assert_eq!(
            ran.text("tids").lines().next().unwrap(),
            r#"{"id": "1", "title": "T", "brand": "mine", "summary_words": ["a", "b", "c", "d", "e"]}"#
        );
        assert_eq!(
            ran.logs(),
            ["1 TIDs are of items that the catalogue does not have", "2 items of the catalogue have no TID", "2 TIDs"]
        );
    }

    #[test]
    fn what_holds_no_tids_is_refused() {
        for (tids, message) in [
            ("", "the file is empty"),
            ("{}", "holds no TID"),
            ("{\"1\": 5}", "the TID of item `1` is 5, not a list of words"),
            ("{\"1\": [5]}", "`summary_words` of item `1` is not a list of strings"),
            ("{\"1\": [\"a\",\n", ":2: not TID records, item_id2tid or id2meta: EOF"),
            ("{\"id\": \"1\"}\n{\"id\": \"2\"}\n", ":2: not TID records"),
        ] {
            let error = Bench::new().input("tids", tids).run("import_tids", json!({})).unwrap_err().to_string();
            assert!(error.contains(message), "{tids:?}: {error}");
        }
    }

    #[test]
    fn the_published_tids_of_beauty_are_read_from_both_files() {
        let Some(data) = shared_data() else { return };
        let beauty = data.join("data/beauty");
        let import = |file: &str| {
            let ran = Bench::new().input_path("tids", beauty.join(file)).run("import_tids", json!({})).unwrap();
            crate::artifact::tids::read(ran.path("tids")).unwrap()
        };
        let records = import("beauty_summaries_with_similarity.jsonl");
        let maps = import("item_id2tid.json");
        assert_eq!(records.len(), 12_101);
        assert_eq!(
            records.iter().map(|r| (r.id(), r.tid_key())).collect::<std::collections::HashMap<_, _>>(),
            maps.iter().map(|r| (r.id(), r.tid_key())).collect()
        );
    }
}
