//! The builders of training samples, one file each, and what they share: streaming alpaca files.
//!
//! `rec_text` renders one item of a history; `generate` uses it too, so that a model is asked in the form in which it
//! was taught.

mod collaborative;
mod merge;
mod meta2tid;
mod rec;
pub mod rec_text;
mod samples;

pub use collaborative::SftCollaborative;
pub use merge::SftMerge;
pub use meta2tid::SftMeta2Tid;
pub use rec::SftRec;

/// The first `limit` characters, and `...` if there were more.
fn shortened(text: &str, limit: Option<usize>) -> std::borrow::Cow<'_, str> {
    match limit.and_then(|limit| text.char_indices().nth(limit)) {
        Some((end, _)) => format!("{}...", &text[..end]).into(),
        None => text.into(),
    }
}

fn check_max_description(compat: crate::Compat, max_description: Option<usize>) -> Vec<crate::ParamIssue> {
    match (compat, max_description) {
        (crate::Compat::Reference, Some(_)) => {
            vec![crate::ParamIssue::new("max_description", "`compat: reference` shows descriptions whole")]
        }
        (_, Some(0)) => vec![crate::ParamIssue::new("max_description", "must be at least 1")],
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::{Bench, shared_data};
    use serde_json::json;
    use sha2::{Digest, Sha256};

    /// From published TIDs to merged training data: every file has the published digest.
    #[test]
    fn the_files_of_beauty_have_the_published_digests() {
        let Some(data) = shared_data() else { return };
        let beauty = data.join("data/beauty");
        let prompts = data.join("data/reference_prompts.json");
        let reference = json!({"compat": "reference"});

        let id2meta = Bench::new()
            .input_path("tids", beauty.join("beauty_summaries_with_similarity.jsonl"))
            .run("id2meta", json!({}))
            .unwrap();
        let bench = Bench::new()
            .input_path("id2meta", id2meta.path("id2meta"))
            .input_path("sequences", beauty.join("sequential_data.txt"))
            .input_path("similar_items", beauty.join("similar_item_sasrec_num.txt"))
            .input_path("prompts", prompts);
        let meta2tid = bench.run("sft_meta2tid", reference.clone()).unwrap();
        let rec = bench.run("sft_rec", reference.clone()).unwrap();
        let collaborative = bench.run("sft_collaborative", reference).unwrap();
        let merged = Bench::new()
            .input_path("rec", rec.path("sft"))
            .input_path("meta2tid", meta2tid.path("sft"))
            .run("sft_merge", json!({}))
            .unwrap();

        let digests = std::fs::read_to_string(data.join("golden/beauty/sha256.txt")).unwrap();
        let mut checked = 0;
        for line in digests.lines() {
            let (expected, file) = line.split_once("  ").unwrap();
            let path = match file {
                "id2meta.json" => id2meta.path("id2meta"),
                "item_id2tid.json" => rec.path("item_id2tid"),
                "tid2item_id.json" => rec.path("tid2item_id"),
                "sft_meta2tid.json" => meta2tid.path("sft"),
                "sft_rec_simplified.json" => rec.path("sft"),
                "sft_rec.json" => rec.path("records"),
                "sft_collaborative.json" => collaborative.path("sft"),
                "sft_merged_rec_meta2tid.json" => merged.path("sft"),
                other => panic!("no output stands for {other}"),
            };
            let digest: String =
                Sha256::digest(std::fs::read(path).unwrap()).iter().map(|b| format!("{b:02x}")).collect();
            assert_eq!(digest, expected, "{file}");
            checked += 1;
        }
        assert_eq!(checked, 8);
    }
}
