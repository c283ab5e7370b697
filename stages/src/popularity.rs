//! Stage `popularity`: the same most bought items for everybody, the floor that any model has to beat.
//!
//! Only what a model may learn from is counted: of a user with a held-out pair, everything but the last two items;
//! of a user too short to be held out, everything. Equally popular items stand in the order in which the sequences
//! first name them.

use rustc_hash::{FxHashMap, FxHashSet};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    Artifact, Input, Output, ParamIssue, Ports, Stage, StageContext, StageError,
    artifact::{Holdout, ItemId, Ranking, Sequence, Split, UserId, jsonl, sequences},
};

/// Shortest sequence that leave-one-out can cut: one item to learn from, one to validate, one to test.
const SHORTEST: usize = 3;

pub struct Popularity;

/// Parameters of `popularity`.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Params {
    /// Items in each user's list.
    pub top_n: usize,
    /// Leaves out what the user had before the target.
    pub exclude_seen: bool,
    /// The held-out items to rank for; `valid` too where a later stage tunes on it.
    pub splits: Vec<Split>,
}

impl Default for Params {
    fn default() -> Self {
        Self { top_n: 20, exclude_seen: true, splits: vec![Split::Test] }
    }
}

impl Stage for Popularity {
    const KIND: &'static str = "popularity";
    const SUMMARY: &'static str = "ranks the most frequent training items for every user: the baseline to beat";
    type Params = Params;

    fn ports(_: &Params) -> Ports {
        Ports::new(
            [
                Input::required("sequences", Artifact::Sequences, "what is counted"),
                Input::required("holdout", Artifact::Holdout, "the users to rank for"),
            ],
            [Output::new("rankings", Artifact::Rankings, "rankings.jsonl", "a list for each user and split")],
        )
    }

    fn check(params: &Params) -> Vec<ParamIssue> {
        let mut issues = Vec::new();
        if params.top_n == 0 {
            issues.push(ParamIssue::new("top_n", "a list needs at least one item"));
        }
        if params.splits.is_empty() {
            issues.push(ParamIssue::new("splits", "nothing to rank for").help("give `test`, `valid` or both"));
        }
        issues
    }

    fn run(params: &Params, cx: &mut StageContext) -> Result<(), StageError> {
        let sequences = sequences::read(cx.input("sequences")?)?;
        let popular = by_popularity(&sequences);
        let seen: FxHashMap<&UserId, &[ItemId]> =
            sequences.iter().map(|s| (&s.user, training_items(&s.items))).collect();
        let mut out = jsonl::Writer::create(cx.output("rankings")?)?;
        for user in jsonl::lines::<Holdout>(cx.input("holdout")?)? {
            let user = user?;
            let mut left_out: FxHashSet<&ItemId> = FxHashSet::default();
            if params.exclude_seen {
                left_out.extend(seen.get(&user.user).copied().unwrap_or_default());
                left_out.extend(&user.history);
            }
            for &split in &params.splits {
                let also = (params.exclude_seen && split == Split::Test).then_some(&user.valid);
                let best = || {
                    popular
                        .iter()
                        .filter(|(item, _)| Some(*item) != also && !left_out.contains(item))
                        .take(params.top_n)
                };
                out.write(&Ranking {
                    user: user.user.clone(),
                    split,
                    target: if split == Split::Test { user.test.clone() } else { user.valid.clone() },
                    items: best().map(|(item, _)| (*item).clone()).collect(),
                    scores: best().map(|(_, count)| *count as f32).collect(),
                    texts: None,
                })?;
            }
        }
        out.finish()
    }
}

/// What may be learned from: all but the two held-out items.
fn training_items(items: &[ItemId]) -> &[ItemId] {
    if items.len() < SHORTEST { items } else { &items[..items.len() - 2] }
}

/// Items with their counts, most frequent first.
fn by_popularity(sequences: &[Sequence]) -> Vec<(&ItemId, u64)> {
    let mut counts: Vec<(&ItemId, u64)> = Vec::new();
    let mut places: FxHashMap<&ItemId, usize> = FxHashMap::default();
    for item in sequences.iter().flat_map(|s| training_items(&s.items)) {
        let place = *places.entry(item).or_insert_with(|| {
            counts.push((item, 0));
            counts.len() - 1
        });
        counts[place].1 += 1;
    }
    counts.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    counts
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing::{refuses, run};

    const SEQUENCES: &str = "u1 a b c d\nu2 a b d d\nu3 b e\nu4 c a d e\n";
    const HOLDOUT: &str = r#"{"user":"u1","history":["a","b"],"valid":"c","test":"d"}
{"user":"u4","history":["c","a"],"valid":"d","test":"e"}
"#;

    #[test]
    fn held_out_items_do_not_count() {
        // Training: a b | a b | b e | c a → a 3, b 3, e 1, c 1; d is only ever held out.
        let inputs = [("sequences", SEQUENCES), ("holdout", HOLDOUT)];
        let all = run("popularity", json!({"exclude_seen": false}), &inputs).unwrap().lines("rankings");
        for ranking in &all {
            assert_eq!(ranking["items"], json!(["a", "b", "e", "c"]));
            assert_eq!(ranking["scores"], json!([3.0, 3.0, 1.0, 1.0]));
            assert_eq!(ranking["split"], "test");
        }
        assert_eq!(all[1]["target"], "e");
    }

    #[test]
    fn seen_items_are_left_out_up_to_the_target() {
        let with = json!({"splits": ["valid", "test"], "top_n": 2});
        let lists = run("popularity", with, &[("sequences", SEQUENCES), ("holdout", HOLDOUT)]).unwrap();
        let items: Vec<_> = lists.lines("rankings").iter().map(|r| r["items"].clone()).collect();
        assert_eq!(items, [json!(["e", "c"]), json!(["e"]), json!(["b", "e"]), json!(["b", "e"])]);
        assert_eq!(lists.lines("rankings")[0]["target"], "c");
    }

    #[test]
    fn bad_input_is_refused() {
        refuses(run("popularity", json!({}), &[("sequences", ""), ("holdout", HOLDOUT)]), &["no sequence"]);
        let cut = &HOLDOUT[..100];
        refuses(run("popularity", json!({}), &[("sequences", SEQUENCES), ("holdout", cut)]), &["input-holdout:2"]);
        assert_eq!(Popularity::check(&Params { top_n: 0, splits: vec![], ..Params::default() }).len(), 2);
    }
}
