//! Which users are kept, with which items, and what is held out of each.

use std::path::Path;

use rustc_hash::FxHashMap;

use super::{Params, UnknownItems};
use crate::{
    StageError,
    artifact::{Id2Meta, sequences},
};

/// A kept user. Items are places in the catalogue.
pub struct User<'a> {
    pub name: &'a str,
    /// The items used, oldest first; the last two are the targets.
    pub items: Vec<usize>,
    /// Number of training items before the cut to the latest ones; decides the user's group.
    pub history_length: usize,
}

impl User<'_> {
    /// The items before both targets.
    pub fn history(&self) -> &[usize] {
        &self.items[..self.items.len() - 2]
    }

    /// The items of this user's sample.
    pub fn sample(&self, with_valid: bool) -> &[usize] {
        &self.items[..self.items.len() - if with_valid { 1 } else { 2 }]
    }

    pub fn valid(&self) -> usize {
        self.items[self.items.len() - 2]
    }

    pub fn test(&self) -> usize {
        self.items[self.items.len() - 1]
    }
}

/// Why items or users were left out.
#[derive(Default)]
pub struct Dropped {
    by_item: bool,
    too_short: u64,
    unknown: Count,
    invalid: Count,
}

#[derive(Default)]
struct Count {
    count: u64,
    first: Option<(String, u64)>,
}

impl Count {
    fn add(&mut self, id: &str, line: u64) {
        self.count += 1;
        self.first.get_or_insert_with(|| (id.to_owned(), line));
    }

    fn text(&self, what: &str) -> Option<String> {
        let (id, line) = self.first.as_ref()?;
        Some(format!("{} {what} (first: `{id}`, line {line})", self.count))
    }
}

impl Dropped {
    pub fn is_empty(&self) -> bool {
        self.too_short + self.unknown.count + self.invalid.count == 0
    }

    /// What to do about most of them.
    pub fn advice(&self) -> &'static str {
        let (unknown, invalid) = (self.unknown.count, self.invalid.count);
        if invalid > unknown && invalid > self.too_short {
            "the stage that made the TIDs says why items have none; give these a longer text, or `overrides` to `tid`"
        } else if unknown > self.too_short {
            "the ids of `sequences` and `id2meta` must come from one catalogue"
        } else {
            "histories are too short: `min_items` says how many items a user needs"
        }
    }

    /// One line that says all.
    pub fn summary(&self) -> String {
        let short = |what: &str| (self.too_short > 0).then(|| format!("{} {what}", self.too_short));
        if self.by_item {
            let items = [self.unknown.text("unknown"), self.invalid.text("without a valid TID")];
            let mut parts = Vec::new();
            if self.unknown.count + self.invalid.count > 0 {
                let total = self.unknown.count + self.invalid.count;
                parts.push(format!("{total} items left out of sequences: {}", join(items)));
            }
            parts.extend(short("users left out: too few items"));
            return parts.join("; ");
        }
        let total = self.too_short + self.unknown.count + self.invalid.count;
        let reasons = [
            short("for too few items"),
            self.unknown.text("for an unknown item"),
            self.invalid.text("for an item without a valid TID"),
        ];
        format!("{total} users left out: {}", join(reasons))
    }
}

fn join(parts: impl IntoIterator<Item = Option<String>>) -> String {
    parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

/// All kept users, in the file's order.
pub struct Users<'a> {
    pub kept: Vec<User<'a>>,
    /// Items with a valid TID by first appearance, those of dropped users up to the item that dropped them included.
    pub appeared: Vec<usize>,
    pub dropped: Dropped,
}

impl<'a> Users<'a> {
    /// # Errors
    /// Nothing in the file; a user on two lines (fixed); an item that cannot be named, if that is to be an error.
    pub fn select(params: &Params, path: &Path, text: &'a str, id2meta: &Id2Meta) -> Result<Self, StageError> {
        let usable: Vec<bool> = id2meta.records().iter().map(|r| r.has_valid_tid()).collect();
        let mut seen = vec![false; id2meta.len()];
        let by_item = params.unknown_items == UnknownItems::DropItem;
        let mut users =
            Self { kept: Vec::new(), appeared: Vec::new(), dropped: Dropped { by_item, ..Dropped::default() } };
        let mut names: FxHashMap<&str, u64> = FxHashMap::default();
        let (mut ids, mut lines) = (Vec::new(), 0u64);
        for line in sequences::lines(text) {
            lines += 1;
            if !params.compat.is_reference()
                && let Some(first) = names.insert(line.head, line.number)
            {
                let message = format!("user `{}` stands on line {first} already", line.head);
                return Err(StageError::input_at(path, line.number, message)
                    .help("run the sequences through an `import_items` stage, which joins them"));
            }
            ids.clear();
            ids.extend(line.items());
            if by_item {
                ids.retain(|id| match id2meta.place(id) {
                    Some(i) if usable[i] => true,
                    Some(_) => {
                        users.dropped.invalid.add(id, line.number);
                        false
                    }
                    None => {
                        users.dropped.unknown.add(id, line.number);
                        false
                    }
                });
            }
            if ids.len() < params.min_items {
                users.dropped.too_short += 1;
                continue;
            }
            let latest = &ids[ids.len().saturating_sub(params.max_items)..];
            let mut items = Vec::with_capacity(latest.len());
            for id in latest {
                let place = id2meta.place(id);
                let (count, why) = match place {
                    Some(i) if usable[i] => {
                        items.push(i);
                        if !std::mem::replace(&mut seen[i], true) {
                            users.appeared.push(i);
                        }
                        continue;
                    }
                    Some(_) => (&mut users.dropped.invalid, "has no valid TID"),
                    None => (&mut users.dropped.unknown, "is not in the catalogue"),
                };
                if params.unknown_items == UnknownItems::Error {
                    return Err(StageError::input_at(path, line.number, format!("item `{id}` {why}"))
                        .help("mend the catalogue, or set `unknown_items: drop_item` or `drop_user`"));
                }
                count.add(id, line.number);
                break;
            }
            if items.len() == latest.len() {
                users.kept.push(User { name: line.head, items, history_length: ids.len() - 2 });
            }
        }
        if lines == 0 {
            return Err(StageError::input(path, "holds no sequence").help("one user a line: `user item item …`"));
        }
        Ok(users)
    }

    pub fn groups(&self) -> Groups {
        Groups::new(self.kept.iter().map(|u| u.history_length).collect())
    }
}

/// Users by length of history, in at most five groups of about equal size; equal lengths share a group.
pub struct Groups(Vec<Group>);

/// The last length that belongs to it, and its name: `3` or `3-5`.
struct Group {
    last: usize,
    name: String,
}

impl Groups {
    fn new(mut lengths: Vec<usize>) -> Self {
        lengths.sort_unstable();
        let mut lasts: Vec<usize> =
            (1..=5).filter_map(|fifth| lengths.get((lengths.len() * fifth / 5).max(1) - 1).copied()).collect();
        lasts.dedup();
        let mut groups: Vec<Group> = Vec::new();
        for last in lasts {
            let above = groups.last().map(|group| group.last);
            let first = lengths.iter().copied().find(|&l| above.is_none_or(|a| l > a)).unwrap_or(last);
            let name = if first == last { first.to_string() } else { format!("{first}-{last}") };
            groups.push(Group { last, name });
        }
        Self(groups)
    }

    pub fn name(&self, length: usize) -> Option<&str> {
        self.0.iter().find(|group| length <= group.last).map(|group| &*group.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_fifths_that_do_not_split_equal_lengths() {
        let names = |lengths: Vec<usize>| Groups::new(lengths).0.into_iter().map(|g| g.name).collect::<Vec<_>>();
        assert_eq!(names((1..=10).collect()), ["1-2", "3-4", "5-6", "7-8", "9-10"]);
        assert_eq!(names(vec![3, 3, 3, 3, 3, 3, 4, 5, 9, 20]), ["3", "4-5", "9-20"]);
        assert_eq!(names(vec![7]), ["7"]);
        assert_eq!(names(vec![1, 5]), ["1", "5"]);
        assert!(names(vec![]).is_empty());
    }
}
