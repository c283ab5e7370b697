//! The catalogue as a run sees it: the token sequences of its TIDs, the items behind each, and whether samples consist
//! of them.

use grlm_nn::{
    generate::Trie,
    train::{Corpus, allowed},
};
use rustc_hash::FxHashMap;

use super::params::Params;
use crate::{
    StageError,
    artifact::{Id2Meta, TokenKind},
    lm::Layout,
};

/// Distinct TIDs, in the catalogue's order, and the items of each.
pub struct Catalogue {
    tids: Vec<Vec<u32>>,
    pub items: Vec<Vec<usize>>,
}

impl Catalogue {
    /// # Errors
    /// The tokenizer cannot take a TID.
    pub fn new(params: &Params, layout: &Layout, id2meta: Option<&Id2Meta>) -> Result<Self, StageError> {
        let records = id2meta.map(Id2Meta::records).unwrap_or_default();
        let mut entry_of: FxHashMap<Vec<u32>, usize> = FxHashMap::default();
        let (mut tids, mut items) = (Vec::new(), Vec::<Vec<usize>>::new());
        for (item, record) in records.iter().enumerate().filter(|(_, r)| r.has_valid_tid()) {
            let Some(tid) = layout.tid(record, params.compat)? else { continue };
            let entry = *entry_of.entry(tid).or_insert_with_key(|tid| {
                tids.push(tid.clone());
                items.push(Vec::new());
                items.len() - 1
            });
            items[entry].push(item);
        }
        Ok(Self { tids, items })
    }

    /// # Errors
    /// There are no TIDs.
    pub fn trie(&self) -> Result<Trie, StageError> {
        Ok(Trie::new(&self.tids)?)
    }

    /// The trie for `normalize: allowed`.
    ///
    /// # Errors
    /// The samples are more, or other, than TIDs of the catalogue in one token a word.
    pub fn trie_for_losses(&self, layout: &Layout, corpus: &Corpus) -> Result<Trie, StageError> {
        if layout.settings().tokens == TokenKind::Model {
            return Err(StageError::params("`normalize: allowed` is for models of one token a word")
                .help("train from scratch on `sft_rec` with `format: compact` alone, or use `normalize: full`"));
        }
        if self.tids.is_empty() {
            return Err(StageError::params("`normalize: allowed` needs the catalogue").help("connect `id2meta`"));
        }
        let trie = self.trie()?;
        let strange = corpus.samples().filter(|s| !allowed::is_written(&trie, &s.tokens[s.learned_from..])).count();
        if strange > 0 {
            return Err(StageError::params(format!("{strange} samples hold TIDs that `id2meta` has not"))
                .help("`sft` and `id2meta` must come from one catalogue"));
        }
        Ok(trie)
    }
}
