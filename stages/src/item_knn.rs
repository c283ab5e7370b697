//! Stage `item_knn`: items that stand near a user's last items in other users' sequences. No training, seconds on one
//! core, and on sparse data close to a neural model; fused with one, better than either.
//!
//! Item-based collaborative filtering (Sarwar et al., "Item-based collaborative filtering recommendation algorithms",
//! WWW 2001) that respects order: two items count the more the nearer they stand to each other, those that came after
//! more than those before, users with long sequences less, and the user's latest items the most.

use rayon::prelude::*;
use rustc_hash::FxHashMap;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    Artifact, Input, Output, ParamIssue, Ports, Resources, Stage, StageContext, StageError,
    artifact::{Ranking, Split},
    leave_one_out::{self, Dataset, User},
    rankings, threads,
};

pub struct ItemKnn;

/// Parameters of `item_knn`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Params {
    /// Places apart that two items of a sequence may stand to count as neighbours.
    pub window: usize,
    /// How much an item counts for one that comes after it in a sequence, beside 1 the other way round.
    pub backward: f32,
    /// Added to both items' counts before similarities are divided by them; the larger, the less rare items profit.
    pub shrink: f32,
    /// Items of a history that are looked at: the last ones.
    pub history: usize,
    /// Weight of each of them, as a share of the weight of the one after it.
    pub decay: f32,
    /// For the test items, counts the validation items too; they are known by then.
    pub refit: bool,
    /// Leaves out what the user had before the target.
    pub exclude_seen: bool,
    /// The held-out items to rank for; `valid` too where a later stage tunes on it.
    pub splits: Vec<Split>,
    /// Items in each user's list.
    pub top_n: usize,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            window: 8,
            backward: 0.7,
            shrink: 2.0,
            history: 10,
            decay: 0.8,
            refit: false,
            exclude_seen: true,
            splits: vec![Split::Test],
            top_n: 50,
        }
    }
}

impl Stage for ItemKnn {
    const KIND: &'static str = "item_knn";
    const SUMMARY: &'static str =
        "ranks what stands near a user's last items in other sequences: a baseline without training";
    type Params = Params;

    fn ports(_: &Params) -> Ports {
        Ports::new(
            [
                Input::required("sequences", Artifact::Sequences, "what is counted"),
                Input::optional(
                    "holdout",
                    Artifact::Holdout,
                    "the users to rank for; without it, every user of at least three items",
                ),
            ],
            [Output::new("rankings", Artifact::Rankings, "rankings.jsonl", "a list for each user and split")],
        )
    }

    fn resources(_: &Params) -> Resources {
        Resources::cpus(2)
    }

    fn check(params: &Params) -> Vec<ParamIssue> {
        let share = |x: f32| (0.0..=1.0).contains(&x);
        let wrong = [
            ("window", params.window == 0, "must be at least 1"),
            ("backward", !share(params.backward), "must be between 0 and 1"),
            ("shrink", !(params.shrink >= 0.0 && params.shrink.is_finite()), "must not be negative"),
            ("history", params.history == 0, "must be at least 1"),
            ("decay", !share(params.decay), "must be between 0 and 1"),
            ("splits", params.splits.is_empty(), "nothing to rank for: give `test`, `valid` or both"),
            ("top_n", params.top_n == 0, "must be at least 1"),
        ];
        wrong.into_iter().filter(|(_, wrong, _)| *wrong).map(|(name, _, text)| ParamIssue::new(name, text)).collect()
    }

    fn run(params: &Params, cx: &mut StageContext) -> Result<(), StageError> {
        let dataset = leave_one_out::read(cx.input("sequences")?, cx.optional_input("holdout"))?;
        let pool = threads::pool(cx)?;
        let splits: Vec<(Split, usize)> = params.splits.iter().map(|split| (*split, dataset.users.len())).collect();
        // One split comes after the other, so that only one's counts are held.
        let mut counted: Option<(Split, Neighbors)> = None;
        rankings::write(cx, &splits, |split, users| {
            let (_, neighbors) = match counted.take_if(|(known, _)| *known == split) {
                Some(known) => counted.insert(known),
                None if params.refit && split == Split::Test => counted
                    .insert((split, Neighbors::count(params, dataset.items.len(), &dataset.training_and_valid()))),
                None => counted.insert((split, Neighbors::count(params, dataset.items.len(), &dataset.training))),
            };
            pool.install(|| rank(params, &dataset, neighbors, &dataset.users[users], split))
        })
    }
}

/// For each item its neighbours and their similarity, by item number.
struct Neighbors(Vec<Vec<(u32, f32)>>);

impl Neighbors {
    /// sim(i, j) = Σ over pairs in a sequence of n items, d places apart: d^(−1/2) / log₂(2 + n), times `backward` where
    /// j comes before i; divided by √((count(i) + shrink) (count(j) + shrink)).
    fn count(params: &Params, items: usize, sequences: &[Vec<u32>]) -> Self {
        let mut counts = vec![0u32; items];
        let mut pairs: Vec<FxHashMap<u32, f32>> = vec![FxHashMap::default(); items];
        for sequence in sequences {
            let share = 1.0 / (2.0 + sequence.len() as f32).log2();
            for (place, &item) in sequence.iter().enumerate() {
                counts[item as usize] += 1;
                for (distance, &later) in (1..=params.window).zip(&sequence[place + 1..]) {
                    if later == item {
                        continue;
                    }
                    let weight = share / (distance as f32).sqrt();
                    *pairs[item as usize].entry(later).or_default() += weight;
                    *pairs[later as usize].entry(item).or_default() += params.backward * weight;
                }
            }
        }
        let norm = |item: usize| (counts[item] as f32 + params.shrink).sqrt();
        let similar = |(item, pairs): (usize, FxHashMap<u32, f32>)| {
            let mut list: Vec<(u32, f32)> =
                pairs.into_iter().map(|(other, sum)| (other, sum / (norm(item) * norm(other as usize)))).collect();
            list.sort_unstable_by_key(|(other, _)| *other);
            list
        };
        Self(pairs.into_iter().enumerate().map(similar).collect())
    }

    /// The best items after a history, with their scores; equal scores in the order of item numbers.
    fn best(&self, params: &Params, history: &[u32], scores: &mut [f32]) -> Vec<(u32, f32)> {
        let mut touched = Vec::new();
        let mut weight = 1.0;
        for &item in history.iter().rev().take(params.history) {
            for &(other, similarity) in &self.0[item as usize] {
                if scores[other as usize] == 0.0 {
                    touched.push(other);
                }
                scores[other as usize] += weight * similarity;
            }
            weight *= params.decay;
        }
        if params.exclude_seen {
            history.iter().for_each(|&item| scores[item as usize] = 0.0);
        }
        let mut list: Vec<(u32, f32)> =
            touched.iter().map(|&item| (item, scores[item as usize])).filter(|(_, score)| *score > 0.0).collect();
        touched.iter().for_each(|&item| scores[item as usize] = 0.0);
        list.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        list.dedup_by_key(|(item, _)| *item);
        list.truncate(params.top_n);
        list
    }
}

fn rank(params: &Params, dataset: &Dataset, neighbors: &Neighbors, users: &[User], split: Split) -> Vec<Ranking> {
    let id = |item: u32| dataset.items[item as usize].clone();
    let one = |scores: &mut Vec<f32>, user: &User| {
        let query = user.query(split);
        let list = neighbors.best(params, &query.history, scores);
        Ranking {
            user: user.id.clone(),
            split,
            target: id(query.target),
            items: list.iter().map(|(item, _)| id(*item)).collect(),
            scores: list.iter().map(|(_, score)| *score).collect(),
            texts: None,
        }
    };
    users.par_iter().map_init(|| vec![0.0; dataset.items.len()], one).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing::{refuses, run, run_on};

    /// Training: `a b c` twice, `d b`, and what is held out after it.
    const SEQUENCES: &str = "u1 a b c x y\nu2 a b c y x\nu3 d b x c\nu4 b c\n";

    #[test]
    fn similarities_follow_the_formula() {
        let params = Params { shrink: 1.0, ..Params::default() };
        // a = 0, b = 1, c = 2, d = 3.
        let neighbors = Neighbors::count(&params, 4, &[vec![0, 1, 2], vec![0, 1, 2], vec![3, 1]]);
        let share = 1.0 / 5f32.log2();
        let close = |got: f32, wanted: f32| assert!((got - wanted).abs() < 1e-6, "{got} and {wanted}");
        let of = |item: usize, other: u32| neighbors.0[item].iter().find(|(o, _)| *o == other).map(|(_, s)| *s);
        close(of(0, 1).unwrap(), 2.0 * share / (3f32 * 4.0).sqrt());
        close(of(1, 0).unwrap(), 0.7 * 2.0 * share / (3f32 * 4.0).sqrt());
        close(of(0, 2).unwrap(), 2.0 * share / 2f32.sqrt() / 3.0);
        assert_eq!(of(0, 3), None, "they never stand together");
    }

    #[test]
    fn near_items_come_first_and_seen_ones_are_left_out() {
        let ran = run("item_knn", json!({"splits": ["valid", "test"]}), &[("sequences", SEQUENCES)]).unwrap();
        let lines = ran.lines("rankings");
        assert_eq!(lines.len(), 6, "u4 is too short to be ranked");
        assert_eq!(
            (&lines[2]["user"], &lines[2]["target"], &lines[2]["split"]),
            (&json!("u3"), &json!("x"), &json!("valid"))
        );
        assert_eq!(lines[2]["items"], json!(["c", "a"]), "c follows b; a comes before it");
        assert!(lines.iter().all(|l| !l["items"].to_string().contains('x')), "held-out items are not counted");
        let with = json!({"splits": ["test"], "refit": true, "exclude_seen": false, "top_n": 5});
        let refit = run("item_knn", with, &[("sequences", SEQUENCES)]).unwrap().lines("rankings");
        assert!(refit.iter().any(|l| l["items"].to_string().contains('x')), "{refit:?}");
        assert!(refit.iter().all(|l| l["items"].as_array().unwrap().len() == 5));
    }

    #[test]
    fn threads_change_nothing_and_bad_input_is_refused() {
        let inputs = [("sequences", SEQUENCES)];
        let on = |threads: usize| run_on(threads, "item_knn", json!({}), &inputs).unwrap().text("rankings");
        assert_eq!(on(1), on(3));
        refuses(run("item_knn", json!({}), &[("sequences", "u1 a\n")]), &["no user can be ranked"]);
        let wrong = Params { window: 0, decay: 1.5, splits: Vec::new(), ..Params::default() };
        assert_eq!(ItemKnn::check(&wrong).len(), 3);
    }
}
