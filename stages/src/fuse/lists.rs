//! What `fuse` reads: every model's list for every user and split, with ids as numbers.

use std::path::{Path, PathBuf};

use rustc_hash::{FxHashMap, FxHashSet};

use crate::{
    StageContext, StageError,
    artifact::{ItemId, Ranking, Split, UserId, jsonl},
};

/// One model's list for one user, best first, each item once.
#[derive(Debug, Clone, Default)]
pub struct List {
    pub items: Vec<u32>,
    pub scores: Vec<f32>,
}

/// The lists of one split.
#[derive(Debug)]
pub struct Table {
    users: Vec<UserId>,
    targets: Vec<u32>,
    /// `[users][models]`; a model that did not rank for a user has an empty list.
    lists: Vec<Vec<List>>,
    known: FxHashMap<UserId, usize>,
}

impl Table {
    fn new() -> Self {
        Self { users: Vec::new(), targets: Vec::new(), lists: Vec::new(), known: FxHashMap::default() }
    }

    pub fn users(&self) -> usize {
        self.users.len()
    }

    pub fn user(&self, user: usize) -> &UserId {
        &self.users[user]
    }

    pub fn target(&self, user: usize) -> u32 {
        self.targets[user]
    }

    /// A list for each model.
    pub fn lists(&self, user: usize) -> &[List] {
        &self.lists[user]
    }

    /// Number of users for whom a model has a list.
    pub fn ranked_by(&self, model: usize) -> usize {
        self.lists.iter().filter(|lists| !lists[model].items.is_empty()).count()
    }
}

/// All that was read.
#[derive(Debug)]
pub struct Corpus {
    items: Vec<ItemId>,
    numbers: FxHashMap<ItemId, u32>,
    valid: Table,
    test: Table,
}

impl Corpus {
    /// Users stand in the order in which the first model ranks them, then those whom only others rank.
    ///
    /// # Errors
    /// A broken record, a user ranked twice by a model, or models that disagree about a target.
    pub fn read(inputs: &[(String, PathBuf)], cx: &mut StageContext) -> Result<Self, StageError> {
        let mut corpus =
            Self { items: Vec::new(), numbers: FxHashMap::default(), valid: Table::new(), test: Table::new() };
        for (model, (_, path)) in inputs.iter().enumerate() {
            cx.check_stop()?;
            for ranking in jsonl::lines::<Ranking>(path)? {
                corpus.add(model, inputs.len(), path, ranking?)?;
            }
        }
        for (split, table) in [("validation", &corpus.valid), ("test", &corpus.test)] {
            for (model, (name, _)) in inputs.iter().enumerate() {
                let missing = table.users() - table.ranked_by(model);
                if missing > 0 && missing < table.users() {
                    cx.warn(format!("`{name}` has no {split} ranking for {missing} of {} users", table.users()));
                }
            }
        }
        Ok(corpus)
    }

    fn add(&mut self, model: usize, models: usize, path: &Path, ranking: Ranking) -> Result<(), StageError> {
        if ranking.scores.len() != ranking.items.len() {
            return Err(StageError::input(
                path,
                format!(
                    "user `{}` has {} items and {} scores",
                    ranking.user,
                    ranking.items.len(),
                    ranking.scores.len()
                ),
            ));
        }
        let target = self.number(&ranking.target);
        let mut list = List::default();
        let mut seen = FxHashSet::default();
        for (item, &score) in ranking.items.iter().zip(&ranking.scores) {
            if !score.is_finite() {
                return Err(StageError::input(path, format!("user `{}` has a score that is no number", ranking.user)));
            }
            let number = self.number(item);
            if seen.insert(number) {
                list.items.push(number);
                list.scores.push(score);
            }
        }
        let table = match ranking.split {
            Split::Valid => &mut self.valid,
            Split::Test => &mut self.test,
        };
        let user = *table.known.entry(ranking.user.clone()).or_insert_with(|| {
            table.users.push(ranking.user.clone());
            table.targets.push(target);
            table.lists.push(vec![List::default(); models]);
            table.users.len() - 1
        });
        if table.targets[user] != target {
            let other = &self.items[table.targets[user] as usize];
            let message =
                format!("the target of user `{}` is `{}` here and `{other}` elsewhere", ranking.user, ranking.target);
            return Err(StageError::input(path, message)
                .help("all rankings must come from the same holdout; connect the same `holdout` to all models"));
        }
        let place = &mut table.lists[user][model];
        if !place.items.is_empty() {
            return Err(StageError::input(path, format!("user `{}` is ranked twice", ranking.user)));
        }
        *place = list;
        Ok(())
    }

    fn number(&mut self, item: &ItemId) -> u32 {
        if let Some(&number) = self.numbers.get(item) {
            return number;
        }
        let number = self.items.len() as u32;
        self.items.push(item.clone());
        self.numbers.insert(item.clone(), number);
        number
    }

    pub fn item(&self, number: u32) -> &ItemId {
        &self.items[number as usize]
    }

    pub fn table(&self, split: Split) -> &Table {
        match split {
            Split::Valid => &self.valid,
            Split::Test => &self.test,
        }
    }
}
