//! Recall on held-out items while training goes on: what `generate` would find, in small.
//!
//! The model is written into the scratch folder and read by the inference engine: no second way of computing it.

use std::path::PathBuf;

use grlm_nn::{
    generate::{Asked, Catalogue, Generator, Normalize, Trie},
    qwen3::Qwen3,
    train::{Model, Stored, export},
};

use super::{params::Params, validation::User};
use crate::{StageContext, StageError, artifact::Id2Meta, generate, lm::Layout};

/// The rank that counts.
const AT: usize = 10;

/// A catalogue to search, and where the model is put.
pub struct Recall {
    trie: Trie,
    /// Items of each entry of the trie, in the catalogue's order.
    items: Vec<Vec<usize>>,
    beams: usize,
    normalize: Normalize,
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
        let catalogue = super::catalogue::Catalogue::new(params, layout, id2meta)?;
        let folder = cx.scratch().join("validation_model");
        std::fs::create_dir_all(&folder).map_err(|e| StageError::io("create", &folder, e))?;
        let normalize = match params.normalize {
            generate::Normalize::Full => Normalize::Full,
            generate::Normalize::Allowed => Normalize::Allowed,
        };
        let trie = catalogue.trie()?;
        Ok(Self { trie, items: catalogue.items, beams: params.validation.beams, normalize, folder })
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
            Catalogue { trie: &self.trie, beams: self.beams, normalize: self.normalize, length_penalty: 0.0 };
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
