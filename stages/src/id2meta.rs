//! Stage `id2meta`: TID records by item id, their words made single tokens of text.
//!
//! A term of several words is joined by hyphens (`hair mask` → `hair-mask`), so that a TID is five words without white
//! space. A later record with the same id replaces the earlier one at its place, which is also what the published
//! script does; the log says how often. There is nothing to set right here, hence no `compat`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    Artifact, Ports, Stage, StageContext, StageError,
    artifact::{Id2Meta, text, tids},
    stage::{Input, Output},
};

pub struct BuildId2Meta;

/// Parameters of `id2meta`: none.
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Params {}

impl Stage for BuildId2Meta {
    const KIND: &'static str = "id2meta";
    const SUMMARY: &'static str = "TID records by item id, with hyphens inside terms";
    type Params = Params;

    fn ports(_: &Params) -> Ports {
        Ports::new(
            [Input::required("tids", Artifact::Tids, "TID records")],
            [Output::new("id2meta", Artifact::Id2meta, "id2meta.json", "the records by item id")],
        )
    }

    fn run(_: &Params, cx: &mut StageContext) -> Result<(), StageError> {
        let mut id2meta = Id2Meta::default();
        let (mut replaced, mut invalid) = (0u64, 0u64);
        for mut record in tids::read(cx.input("tids")?)? {
            if record.words().any(|word| word.contains(text::is_python_space)) {
                let words: Vec<String> = record.words().map(hyphenate).collect();
                record.set_words(words);
            }
            invalid += u64::from(!record.has_valid_tid());
            replaced += u64::from(id2meta.insert(record).is_some());
        }
        if replaced > 0 {
            cx.warn(format!("{replaced} records had the id of an earlier one and replaced it"));
        }
        if invalid > 0 {
            cx.warn(format!("{invalid} records have no valid TID (five words, none blank)"));
        }
        id2meta.write(cx.output("id2meta")?)
    }
}

/// Joins the words of a term by hyphens.
pub fn hyphenate(term: &str) -> String {
    let words: Vec<&str> = term.split(text::is_python_space).filter(|w| !w.is_empty()).collect();
    words.join("-")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Bench, shared_data};
    use serde_json::json;

    #[test]
    fn the_published_layout_comes_out_byte_for_byte() {
        let Some(data) = shared_data() else { return };
        let quirks = data.join("golden/quirks");
        let bench = Bench::new().input_path("tids", quirks.join("summaries_with_similarity.jsonl"));
        let ran = bench.run("id2meta", json!({})).unwrap();
        let expected = std::fs::read_to_string(quirks.join("expected/id2meta.json")).unwrap();
        assert!(ran.text("id2meta") == expected, "differs from the published file");
        assert_eq!(ran.json("id2meta")["14"]["title"], "Item 14, later line");
        assert_eq!(
            ran.logs(),
            [
                "1 records had the id of an earlier one and replaced it",
                "3 records have no valid TID (five words, none blank)"
            ]
        );
    }

    #[test]
    fn bad_records_are_named_with_their_line() {
        for (tids, message) in [
            ("", "holds no record"),
            ("{\"id\": \"1\", \"summary_words\": []}\n{\"id\": \"2\"}", ":2: item `2` has no `summary_words`"),
            ("{\"id\": \"1\", \"summary", ":1: not valid JSON: EOF"),
        ] {
            let error = Bench::new().input("tids", tids).run("id2meta", json!({})).err().unwrap().to_string();
            assert!(error.contains(message), "{error}");
        }
    }

    #[test]
    fn terms_lose_their_white_space() {
        for (term, word) in [
            ("hair mask", "hair-mask"),
            (" padded ", "padded"),
            ("tab\tword", "tab-word"),
            ("", ""),
            (" \u{1f}a\u{a0}b", "a-b"),
        ] {
            assert_eq!(hyphenate(term), word);
        }
    }
}
