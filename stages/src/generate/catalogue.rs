//! What can be recommended: the items' TIDs as token sequences, and the items behind each.

use std::{collections::BTreeMap, path::Path};

use rustc_hash::{FxHashMap, FxHashSet};
use serde_json::{Map, Value};

use crate::{
    Compat, StageError,
    artifact::{Holdout, Id2Meta, ItemId, TidRecord, text},
    lm::Layout,
    sft::rec_text::{self, Place, TID_LABEL},
};

/// The TIDs of a catalogue. An *entry* is a TID's number, in the order of their tokens.
pub struct Tids {
    sequences: Vec<Vec<u32>>,
    /// The items of each entry: what users have more often first, then in the order of `id2meta`.
    items: Vec<Vec<ItemId>>,
    entry_of: FxHashMap<ItemId, u32>,
    /// TID, words joined by `,` → entries. More than one where what follows a TID changes its last token.
    entries_of_key: FxHashMap<String, Vec<u32>>,
    /// For each item, the tokens of all that a model writes for it.
    texts: FxHashMap<ItemId, Vec<u32>>,
    /// Items whose TID the tokenizer cannot spell.
    pub unwritable: usize,
    /// Items without a valid TID.
    pub without_words: usize,
}

impl Tids {
    /// # Errors
    /// `only` cannot be read, or nothing can be recommended.
    pub fn new(
        layout: &Layout,
        id2meta: &Id2Meta,
        only: Option<&Path>,
        holdout: &[Holdout],
        compat: Compat,
    ) -> Result<Self, StageError> {
        let only = only.map(read_allowed).transpose()?;
        let is_allowed =
            |record: &&TidRecord| record.has_valid_tid() && only.as_ref().is_none_or(|only| only.contains(record.id()));
        let mut unwritable = 0;
        let mut by_tokens: BTreeMap<Vec<u32>, Vec<&TidRecord>> = BTreeMap::new();
        for record in id2meta.records().iter().filter(is_allowed) {
            match layout.tid(record, compat)? {
                Some(tokens) => by_tokens.entry(tokens).or_default().push(record),
                None => unwritable += 1,
            }
        }
        if by_tokens.is_empty() {
            return Err(StageError::params("no item can be recommended")
                .help("items need five words that are not blank, and that the model's tokenizer can spell"));
        }
        let mut counts: FxHashMap<&ItemId, usize> = FxHashMap::default();
        holdout.iter().flat_map(|h| &h.history).for_each(|item| *counts.entry(item).or_default() += 1);
        let mut tids = Self {
            sequences: Vec::new(),
            items: Vec::new(),
            entry_of: FxHashMap::default(),
            entries_of_key: FxHashMap::default(),
            texts: FxHashMap::default(),
            unwritable,
            without_words: id2meta.records().iter().filter(|record| !record.has_valid_tid()).count(),
        };
        for (entry, (tokens, mut records)) in (0..).zip(by_tokens) {
            records.sort_by_key(|r| std::cmp::Reverse(counts.get(r.id()).copied().unwrap_or(0)));
            for record in &records {
                tids.entry_of.insert(record.id().clone(), entry);
                tids.texts.insert(record.id().clone(), whole_text(layout, record, compat)?);
                let entries = tids.entries_of_key.entry(record.tid_key()).or_default();
                if !entries.contains(&entry) {
                    entries.push(entry);
                }
            }
            tids.items.push(records.into_iter().map(|r| r.id().clone()).collect());
            tids.sequences.push(tokens);
        }
        Ok(tids)
    }

    /// The tokens of each entry, ascending.
    pub fn sequences(&self) -> &[Vec<u32>] {
        &self.sequences
    }

    /// Tokens of the longest TID.
    pub fn longest(&self) -> usize {
        self.sequences.iter().map(Vec::len).max().unwrap_or(0)
    }

    /// How many items can be recommended.
    pub fn items(&self) -> usize {
        self.entry_of.len()
    }

    pub fn items_of(&self, entry: u32) -> &[ItemId] {
        &self.items[entry as usize]
    }

    /// The items of a TID given by its words, joined by `,`.
    pub fn items_of_key(&self, key: &str) -> impl Iterator<Item = &ItemId> {
        self.entries_of_key.get(key).into_iter().flatten().flat_map(|entry| self.items_of(*entry))
    }

    /// The tokens of an item's TID and of what stands behind it.
    pub fn text_of(&self, item: &ItemId) -> &[u32] {
        self.texts.get(item).map_or(&[], Vec::as_slice)
    }

    /// The entries all of whose items are among `seen`.
    pub fn entries_of_only<'a>(&self, seen: impl IntoIterator<Item = &'a ItemId>) -> Vec<u32> {
        let mut counts: BTreeMap<u32, FxHashSet<&ItemId>> = BTreeMap::new();
        for item in seen {
            if let Some(entry) = self.entry_of.get(item) {
                counts.entry(*entry).or_default().insert(item);
            }
        }
        counts.into_iter().filter(|(entry, seen)| seen.len() == self.items_of(*entry).len()).map(|(e, _)| e).collect()
    }

    /// A digest of the token sequences; with `texts` also of the items and of what stands behind them.
    pub fn digest(&self, texts: bool) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        let add = |hasher: &mut blake3::Hasher, tokens: &[u32]| {
            hasher.update(&(tokens.len() as u64).to_le_bytes());
            tokens.iter().for_each(|token| {
                hasher.update(&token.to_le_bytes());
            });
        };
        for (tokens, items) in self.sequences.iter().zip(&self.items) {
            add(&mut hasher, tokens);
            if texts {
                // Which comes first is decided by histories, and changes no score.
                let mut items: Vec<&ItemId> = items.iter().collect();
                items.sort_unstable();
                hasher.update(&(items.len() as u64).to_le_bytes());
                for item in items {
                    hasher.update(&(item.0.len() as u64).to_le_bytes());
                    hasher.update(item.0.as_bytes());
                    add(&mut hasher, self.text_of(item));
                }
            }
        }
        hasher.finalize()
    }
}

/// The tokens behind the label: the whole item as training has it, to the end of its line.
fn whole_text(layout: &Layout, record: &TidRecord, compat: Compat) -> Result<Vec<u32>, StageError> {
    let mut text = String::new();
    if layout.settings().format == crate::artifact::SftFormat::Compact {
        rec_text::push_compact(&mut text, record);
        return Ok(layout.tokenizer().encode(&text)?);
    }
    rec_text::push_text(&mut text, record, Place::Later, compat);
    let label = layout.tokenizer().encode(TID_LABEL)?.len();
    Ok(layout.tokenizer().encode(&text)?.split_off(label))
}

/// The items of a `tid2item_id` file.
fn read_allowed(path: &Path) -> Result<FxHashSet<ItemId>, StageError> {
    let entries: Map<String, Value> =
        serde_json::from_str(&text::read(path)?).map_err(|e| text::json_error(path, &e, "an object TID → items"))?;
    let mut items = FxHashSet::default();
    for (key, ids) in entries {
        let ids: Vec<ItemId> = serde_json::from_value(ids)
            .map_err(|e| StageError::input(path, format!("the items of `{key}` are not a list of ids: {e}")))?;
        items.extend(ids);
    }
    Ok(items)
}
