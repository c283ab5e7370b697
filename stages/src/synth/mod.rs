//! Stage `synth`: a made-up catalogue and made-up users with a taste that can be learnt, the same for the same seed.
//!
//! It feeds the quickstart and tests, where nothing may be downloaded. `words` holds the vocabulary, `catalogue` the
//! products, `users` what users do with them.

mod catalogue;
mod users;
mod words;

use std::fmt::Write;

use rand::{SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    Artifact, ParamIssue, Ports, Stage, StageContext, StageError,
    artifact::{Item, items},
    stage::Output,
};

pub struct Synth;

/// Parameters of `synth`.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Params {
    /// Number of items in the catalogue.
    pub items: usize,
    /// Number of users.
    pub users: usize,
    /// Another seed gives another catalogue and other users.
    pub seed: u64,
    /// Shortest history of a user, in items.
    pub min_length: usize,
    /// Longest history of a user, in items.
    pub max_length: usize,
    /// Share of a user's items that follow no taste, from 0 to 1.
    pub noise: f64,
}

impl Default for Params {
    fn default() -> Self {
        Self { items: 600, users: 2_000, seed: 42, min_length: 5, max_length: 16, noise: 0.1 }
    }
}

impl Stage for Synth {
    const KIND: &'static str = "synth";
    const SUMMARY: &'static str = "a made-up catalogue and users whose next item can be learnt";
    type Params = Params;

    fn ports(_: &Params) -> Ports {
        Ports::new(
            [],
            [
                Output::new("items", Artifact::Items, "items.jsonl", "the catalogue"),
                Output::new("sequences", Artifact::Sequences, "sequential_data.txt", "users' items, oldest first"),
            ],
        )
    }

    fn check(params: &Params) -> Vec<ParamIssue> {
        let mut issues = Vec::new();
        if params.users == 0 {
            issues.push(ParamIssue::new("users", "must be at least 1"));
        }
        if params.min_length < 3 {
            issues.push(ParamIssue::new("min_length", "must be at least 3: a history and two targets"));
        }
        if params.max_length < params.min_length {
            issues.push(ParamIssue::new("max_length", "must not be less than `min_length`"));
        }
        if params.items < params.max_length.saturating_mul(2) {
            issues.push(ParamIssue::new("items", "must be at least twice `max_length`: nobody takes an item twice"));
        }
        if !(0.0..=1.0).contains(&params.noise) {
            issues.push(ParamIssue::new("noise", "must lie between 0 and 1"));
        }
        issues
    }

    fn run(params: &Params, cx: &mut StageContext) -> Result<(), StageError> {
        let (catalogue, sequences) = make(params);
        items::write(cx.output("items")?, &catalogue)?;
        let path = cx.output("sequences")?;
        std::fs::write(path, sequences).map_err(|e| StageError::io("write", path, e))?;
        cx.info(format!("{} items, {} users", params.items, params.users));
        Ok(())
    }
}

fn make(params: &Params) -> (Vec<Item>, String) {
    let mut rng = ChaCha8Rng::seed_from_u64(params.seed);
    let products = catalogue::products(params.items, &mut rng);
    // Ids must not give popularity away.
    let mut numbers: Vec<usize> = (1..=products.len()).collect();
    numbers.shuffle(&mut rng);
    let mut catalogue: Vec<(usize, Item)> =
        products.iter().zip(&numbers).map(|(p, &n)| (n, catalogue::item(p, n, &mut rng))).collect();
    catalogue.sort_unstable_by_key(|(number, _)| *number);

    let shop = users::Shop::open(&products);
    let mut sequences = String::new();
    for user in 1..=params.users {
        let _ = write!(sequences, "{user}");
        for item in shop.visit(params, &mut rng) {
            let _ = write!(sequences, " {}", numbers[item]);
        }
        sequences.push('\n');
    }
    (catalogue.into_iter().map(|(_, item)| item).collect(), sequences)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::artifact::sequences::lines;
    use crate::testing::Bench;
    use serde_json::json;
    use std::collections::{HashMap, HashSet};

    #[test]
    fn the_same_seed_gives_the_same_files_and_another_others() {
        let files = |seed: u64| {
            let ran = Bench::new().run("synth", json!({"items": 100, "users": 50, "seed": seed})).unwrap();
            (ran.text("items"), ran.text("sequences"))
        };
        assert_eq!(files(1), files(1));
        assert_ne!(files(1).0, files(2).0);
        assert_ne!(files(1).1, files(2).1);
    }

    #[test]
    fn users_keep_to_their_bounds_and_take_nothing_twice() {
        let params = Params { min_length: 4, max_length: 9, ..Params::default() };
        let (items, sequences) = make(&params);
        let ids: HashSet<&str> = items.iter().map(|i| i.id.as_str()).collect();
        assert_eq!(ids.len(), params.items);
        assert_eq!(items.iter().map(|i| i.title().unwrap().into_owned()).collect::<HashSet<_>>().len(), params.items);
        assert_eq!(lines(&sequences).count(), params.users);
        for line in lines(&sequences) {
            let items: Vec<&str> = line.items().collect();
            assert!((4..=9).contains(&items.len()));
            assert_eq!(items.iter().collect::<HashSet<_>>().len(), items.len());
            assert!(items.iter().all(|i| ids.contains(i)));
        }
    }

    /// Recall@10 on the last item of a first-order Markov chain, counted on all items before it, against popularity.
    #[test]
    fn the_next_item_can_be_learnt_from_the_last_and_not_from_popularity() {
        let (_, sequences) = make(&Params::default());
        let users: Vec<Vec<&str>> = lines(&sequences).map(|l| l.items().collect()).collect();
        let mut popularity: HashMap<&str, u32> = HashMap::new();
        let mut next: HashMap<&str, HashMap<&str, u32>> = HashMap::new();
        for user in &users {
            let train = &user[..user.len() - 1];
            for item in train {
                *popularity.entry(item).or_default() += 1;
            }
            for pair in train.windows(2) {
                *next.entry(pair[0]).or_default().entry(pair[1]).or_default() += 1;
            }
        }
        let top = |counts: &HashMap<&str, u32>| {
            let mut ranked: Vec<_> = counts.iter().map(|(&i, &n)| (std::cmp::Reverse(n), i.to_owned())).collect();
            ranked.sort_unstable();
            ranked.into_iter().take(10).map(|(_, i)| i).collect::<HashSet<String>>()
        };
        let popular = top(&popularity);
        let (mut by_popularity, mut by_chain) = (0.0, 0.0);
        for user in &users {
            let (target, last) = (user[user.len() - 1], user[user.len() - 2]);
            by_popularity += f64::from(popular.contains(target)) / users.len() as f64;
            by_chain += f64::from(next.get(last).is_some_and(|n| top(n).contains(target))) / users.len() as f64;
        }
        assert!(by_chain > 0.4 && by_chain > 5.0 * by_popularity, "chain {by_chain:.3}, popularity {by_popularity:.3}");
        assert!(by_popularity > 0.02, "popularity {by_popularity:.3}");
    }

    #[test]
    fn impossible_sizes_are_refused() {
        let error = Bench::new()
            .run("synth", json!({"items": 10, "users": 0, "min_length": 1, "max_length": 0, "noise": 2.0}))
            .unwrap_err()
            .to_string();
        for name in ["users", "min_length", "max_length", "noise"] {
            assert!(error.contains(&format!("{name:?}")), "{error}");
        }
    }
}
