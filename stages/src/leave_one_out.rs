//! What a recommender may learn from, and whom it ranks for: ids become numbers, and held-out items leave training.
//! Shared by the kinds that learn from sequences of items.
//!
//! A user of at least three items is split leave-one-out: the last item is the test target, the one before it the
//! validation target, and neither is trained on, whether or not the user is to be ranked. Shorter sequences are trained
//! on whole. Where a holdout gives other targets than the sequence ends with, its history alone is trained on.

use std::path::Path;

use grlm_nn::sasrec::Query;
use rustc_hash::FxHashMap;

use crate::{
    StageError,
    artifact::{Holdout, ItemId, Split, UserId, jsonl, sequences, text},
};

/// Shortest sequence that leave-one-out can cut: one item to learn from, one to validate, one to test.
const SHORTEST: usize = 3;

/// Sequences and users in numbers.
#[derive(Debug)]
pub struct Dataset {
    /// What an item's number stands for.
    pub items: Vec<ItemId>,
    pub training: Vec<Vec<u32>>,
    /// The validation target that follows each training sequence, where it has one.
    valid: Vec<Option<u32>>,
    /// Whom to rank for, in the order of the holdout (or of the sequences).
    pub users: Vec<User>,
}

/// A user to rank for.
#[derive(Debug)]
pub struct User {
    pub id: UserId,
    history: Vec<u32>,
    valid: u32,
    test: u32,
}

impl User {
    /// What is known at the time of the target, and the target.
    pub fn query(&self, split: Split) -> Query {
        match split {
            Split::Valid => Query { history: self.history.clone(), target: self.valid },
            Split::Test => {
                let history = self.history.iter().copied().chain([self.valid]).collect();
                Query { history, target: self.test }
            }
        }
    }
}

impl Dataset {
    /// Training sequences that go on to their validation targets; test targets stay out.
    pub fn training_and_valid(&self) -> Vec<Vec<u32>> {
        self.training
            .iter()
            .zip(&self.valid)
            .map(|(items, valid)| items.iter().copied().chain(*valid).collect())
            .collect()
    }

    /// Items of which training has seen at least one, ascending.
    pub fn trained_items(&self) -> Vec<u32> {
        let mut items: Vec<u32> = self.training.iter().flatten().copied().collect();
        items.sort_unstable();
        items.dedup();
        items
    }
}

/// Numbers in the order of first appearance.
#[derive(Default)]
struct Numbers {
    items: Vec<ItemId>,
    known: FxHashMap<ItemId, u32>,
}

impl Numbers {
    fn of(&mut self, id: &str) -> u32 {
        if let Some(&number) = self.known.get(id) {
            return number;
        }
        let number = self.items.len() as u32;
        self.items.push(id.into());
        self.known.insert(id.into(), number);
        number
    }
}

/// Reads both inputs.
///
/// # Errors
/// A user stands twice in one of them, a record is broken, or nobody can be ranked.
pub fn read(sequences: &Path, holdout: Option<&Path>) -> Result<Dataset, StageError> {
    let text = text::read(sequences)?;
    let mut numbers = Numbers::default();
    let mut order: Vec<&str> = Vec::new();
    let mut lines: FxHashMap<&str, (u64, Vec<u32>)> = FxHashMap::default();
    for line in sequences::lines(&text) {
        let items = line.items().map(|item| numbers.of(item)).collect();
        if let Some((first, _)) = lines.insert(line.head, (line.number, items)) {
            let message = format!("user `{}` of line {first} stands here again", line.head);
            return Err(StageError::input_at(sequences, line.number, message).help("join the user's lines into one"));
        }
        order.push(line.head);
    }
    if order.is_empty() {
        return Err(
            StageError::input(sequences, "holds no sequence").help("one user a line: `user item item …`, oldest first")
        );
    }

    let held_out = match holdout {
        Some(path) => read_holdout(path)?,
        None => Vec::new(),
    };
    let by_user: FxHashMap<&str, &Holdout> = held_out.iter().map(|h| (h.user.as_str(), h)).collect();
    let mut users: FxHashMap<&str, User> = FxHashMap::default();
    let mut training = Vec::with_capacity(order.len());
    let mut valid = Vec::with_capacity(order.len());
    for &user in &order {
        let Some((_, items)) = lines.remove(user) else { continue };
        let cut = if items.len() < SHORTEST { items.len() } else { items.len() - 2 };
        let targets = items.get(cut..).filter(|t| t.len() == 2);
        let known = match by_user.get(user) {
            Some(held) => number_user(held, targets.map(|t| (&items[..cut], [t[0], t[1]])), &mut numbers),
            None => match targets {
                Some(t) => User { id: user.into(), history: items[..cut].to_vec(), valid: t[0], test: t[1] },
                None => {
                    training.push(items);
                    valid.push(None);
                    continue;
                }
            },
        };
        training.push(known.history.clone());
        valid.push(Some(known.valid));
        users.insert(user, known);
    }
    // Users of the holdout who have no sequence bring their history along.
    for held in &held_out {
        if !users.contains_key(held.user.as_str()) {
            let user = number_user(held, None, &mut numbers);
            training.push(user.history.clone());
            valid.push(Some(user.valid));
            users.insert(&held.user.0, user);
        }
    }
    let wanted: Vec<&str> = match holdout {
        Some(_) => held_out.iter().map(|h| h.user.as_str()).collect(),
        None => order,
    };
    let users: Vec<User> = wanted.into_iter().filter_map(|user| users.remove(user)).collect();
    if users.is_empty() {
        return Err(StageError::input(holdout.unwrap_or(sequences), "no user can be ranked")
            .help("users need at least three items: one to learn from, one to validate, one to test"));
    }
    Ok(Dataset { items: numbers.items, training, valid, users })
}

/// A user of the holdout in numbers. The sequence's history is the longer one where both agree on the targets.
fn number_user(held: &Holdout, sequence: Option<(&[u32], [u32; 2])>, numbers: &mut Numbers) -> User {
    let (valid, test) = (numbers.of(held.valid.as_str()), numbers.of(held.test.as_str()));
    let history = match sequence {
        Some((history, targets)) if targets == [valid, test] => history.to_vec(),
        _ => held.history.iter().map(|item| numbers.of(item.as_str())).collect(),
    };
    User { id: held.user.clone(), history, valid, test }
}

fn read_holdout(path: &Path) -> Result<Vec<Holdout>, StageError> {
    let holdout: Vec<Holdout> = jsonl::read(path)?;
    let mut seen = FxHashMap::default();
    for (number, held) in (1u64..).zip(&holdout) {
        if let Some(first) = seen.insert(&held.user, number) {
            let message = format!("user `{}` of record {first} stands here again", held.user);
            return Err(StageError::input_at(path, number, message));
        }
    }
    Ok(holdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dataset(sequences: &str, holdout: Option<&str>) -> Dataset {
        let folder = tempfile::tempdir().unwrap();
        let (s, h) = (folder.path().join("s"), folder.path().join("h"));
        std::fs::write(&s, sequences).unwrap();
        std::fs::write(&h, holdout.unwrap_or_default()).unwrap();
        read(&s, holdout.map(|_| h.as_path())).unwrap()
    }

    #[test]
    fn the_last_two_items_leave_training() {
        let data = dataset("u a b c d\nv a b\nw b c a\n", None);
        assert_eq!(data.training, [vec![0, 1], vec![0, 1], vec![1]]);
        assert_eq!(data.users.len(), 2, "two items are too few to rank");
        let query = data.users[0].query(Split::Test);
        assert_eq!((query.history, query.target), (vec![0, 1, 2], 3));
        let query = data.users[0].query(Split::Valid);
        assert_eq!((query.history, query.target), (vec![0, 1], 2));
        assert_eq!(data.trained_items(), [0, 1]);
        assert_eq!(data.training_and_valid(), [vec![0, 1, 2], vec![0, 1], vec![1, 2]]);
    }

    #[test]
    fn a_holdout_says_whom_to_rank_and_may_have_its_own_targets() {
        let holdout = "{\"user\":\"w\",\"history\":[\"b\"],\"valid\":\"c\",\"test\":\"e\"}\n\
                       {\"user\":\"u\",\"history\":[\"b\"],\"valid\":\"c\",\"test\":\"d\"}\n\
                       {\"user\":\"x\",\"history\":[\"d\",\"a\"],\"valid\":\"b\",\"test\":\"c\"}\n";
        let data = dataset("u a b c d\nv d c b a\nw b c a d\n", Some(holdout));
        // `u` agrees with the sequence, whose history is longer; `v` is not ranked, and still not trained on whole.
        assert_eq!(data.training, [vec![0, 1], vec![3, 2], vec![1], vec![3, 0]]);
        let order: Vec<&str> = data.users.iter().map(|u| u.id.as_str()).collect();
        assert_eq!(order, ["w", "u", "x"]);
        assert_eq!(data.items[4].as_str(), "e", "an item that no sequence holds is numbered last");
    }
}
