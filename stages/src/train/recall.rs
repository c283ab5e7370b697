//! Recall on held-out items while training goes on: what `generate` would find, in small.
//!
//! The model is written into the scratch folder and read by the inference engine: no second way of computing it.

use std::path::PathBuf;

use grlm_nn::{
    generate::{Asked, Catalogue, Generator, Normalize, Trie},
    qwen3::Qwen3,
    train::{Model, Stored, export},
};
use rustc_hash::FxHashMap;

use super::{params::Params, validation::User};
use crate::{StageContext, StageError, artifact::Id2Meta, lm::Layout};

/// The rank that counts.
const AT: usize = 10;

/// A catalogue to search, and where the model is put.
pub struct Recall {
    trie: Trie,
    /// Items of each entry of the trie, in the catalogue's order.
    items: Vec<Vec<usize>>,
    beams: usize,
    folder: PathBuf,
}

impl Recall {
    /// # Errors
    /// The catalogue is not connected, or none of it can be written; the folder cannot be made.
    pub fn new(
        params: &Params,
        layout: &Layout,
        id2meta: Option<&Id2Meta>,
        cx: &StageContext,
    ) -> Result<Self, StageError> {
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
        let folder = cx.scratch().join("validation_model");
        std::fs::create_dir_all(&folder).map_err(|e| StageError::io("create", &folder, e))?;
        Ok(Self { trie: Trie::new(&tids)?, items, beams: params.validation.beams, folder })
    }

    /// The share of users whose held-out item is among the first ten. Items of one TID are listed in the catalogue's
    /// order.
    ///
    /// # Errors
    /// The disk is full, or the like.
    pub fn measure(&self, model: &Model, users: &[User], pool: &rayon::ThreadPool) -> Result<f64, StageError> {
        export::write(&self.folder, model.config(), &model.merged(), Stored::F32)?;
        let engine = Qwen3::load(&self.folder)?;
        let catalogue =
            Catalogue { trie: &self.trie, beams: self.beams, normalize: Normalize::Full, length_penalty: 0.0 };
        let asked: Vec<Asked> = users.iter().map(|u| Asked { tokens: &u.prompt, left_out: &[] }).collect();
        let found = pool.install(|| {
            let generator = Generator::new(&engine, pool.current_num_threads());
            catalogue.search(&generator, &asked)
        })?;
        let hit = |(user, found): (&User, Vec<grlm_nn::generate::Found>)| {
            found.iter().flat_map(|f| &self.items[f.entry as usize]).take(AT).any(|item| *item == user.target)
        };
        let hits = users.iter().zip(found).filter(|(u, f)| hit((u, f.clone()))).count();
        Ok(hits as f64 / users.len().max(1) as f64)
    }
}
