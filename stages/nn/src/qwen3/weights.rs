//! The weights of a model folder: one or many safetensors files, mapped, checked against the shapes that the
//! configuration makes them, and given out in f32.

use std::{
    collections::HashMap,
    fs::{self, File},
    path::{Path, PathBuf},
    sync::Arc,
};

use candle_core::{DType, Device};
use half::{bf16, f16};
use memmap2::Mmap;
use rayon::prelude::*;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

use super::Config;
use crate::{
    Error,
    cpu::{Panels, WIDTH},
};

/// All tensors of a folder, by name. Nothing is read before it is asked for.
pub struct Weights {
    folder: PathBuf,
    tensors: HashMap<String, Tensor>,
    /// Tensors of types that are not read.
    unread: HashMap<String, Dtype>,
    names: Names,
}

/// How names in the files differ from those that are asked for: the same network is saved alone or inside another.
#[derive(Debug, Clone, Copy)]
enum Names {
    Same,
    /// Saved without the network around it.
    Without(&'static str),
    /// Saved inside a network of this name.
    Inside(&'static str),
}

/// One tensor, still in its file.
#[derive(Clone)]
pub struct Tensor {
    file: Arc<Mmap>,
    start: usize,
    end: usize,
    dtype: FloatType,
    shape: Vec<usize>,
}

/// The types in which weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FloatType {
    F32,
    Bf16,
    F16,
}

#[derive(Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

impl Weights {
    /// Opens the weights of a Qwen3, and checks that every tensor of `config` is there in its shape.
    ///
    /// # Errors
    /// As [`Weights::map`] and [`Weights::check`].
    pub fn open(folder: &Path, config: &Config) -> Result<Self, Error> {
        let mut weights = Self::map(folder)?;
        // Encoders are saved without the language model around them, and their names without `model.`.
        let bare = !weights.has("model.embed_tokens.weight") && weights.has("embed_tokens.weight");
        if bare {
            weights.names = Names::Without("model.");
        }
        let wanted = config.tensors().into_iter().filter(|(name, _)| !(bare && name == "lm_head.weight"));
        weights.check(wanted)?;
        weights.check_layers(config.layers)?;
        Ok(weights)
    }

    /// Checks that no layer is stored beyond the first `layers`: a model cut short computes something else.
    ///
    /// # Errors
    /// One is.
    pub fn check_layers(&self, layers: usize) -> Result<(), Error> {
        let number = |name: &str| {
            let (_, rest) = name.split_once("layers.").or_else(|| name.split_once("layer."))?;
            rest.split('.').next()?.parse::<usize>().ok()
        };
        match self.tensors.keys().filter_map(|name| number(name)).max() {
            Some(last) if last >= layers => Err(Error::model(
                &self.folder,
                format!("the weights have {} layers, and config.json says {layers}", last + 1),
            )
            .help("config.json and the weights are of different models")),
            _ => Ok(()),
        }
    }

    /// Opens `model.safetensors`, or the files that `model.safetensors.index.json` names.
    ///
    /// # Errors
    /// A file is missing, cut short or not safetensors.
    pub fn map(folder: &Path) -> Result<Self, Error> {
        let (mut tensors, mut unread) = (HashMap::new(), HashMap::new());
        for path in files(folder)? {
            map_file(&path, &mut tensors, &mut unread)?;
        }
        Ok(Self { folder: folder.to_owned(), tensors, unread, names: Names::Same })
    }

    /// Takes names to be inside one of `networks`, where the tensor `probe` is there and not at the top.
    pub fn inside(mut self, networks: &[&'static str], probe: &str) -> Self {
        if !self.has(probe)
            && let Some(network) = networks.iter().find(|network| self.has(&format!("{network}{probe}")))
        {
            self.names = Names::Inside(network);
        }
        self
    }

    fn has(&self, stored: &str) -> bool {
        self.tensors.contains_key(stored) || self.unread.contains_key(stored)
    }

    /// Checks that all tensors of these names are there, in these shapes.
    ///
    /// # Errors
    /// One is missing, or its shape or type is another.
    pub fn check(&self, wanted: impl IntoIterator<Item = (String, Vec<usize>)>) -> Result<(), Error> {
        for (name, shape) in wanted {
            let tensor = self.get(&name)?;
            if tensor.shape != shape {
                return Err(Error::model(
                    &self.folder,
                    format!("`{name}` has the shape {:?}, and config.json makes it {shape:?}", tensor.shape),
                )
                .help("config.json and the weights are of different models"));
            }
        }
        Ok(())
    }

    /// The tensor of this name (as [`Config::tensors`] spells it).
    ///
    /// # Errors
    /// There is none, or it is stored as another type than f32, bf16 or f16.
    pub fn get(&self, name: &str) -> Result<&Tensor, Error> {
        let stored = match self.names {
            Names::Same => name.to_owned(),
            Names::Without(network) => name.strip_prefix(network).unwrap_or(name).to_owned(),
            Names::Inside(network) => format!("{network}{name}"),
        };
        if let Some(tensor) = self.tensors.get(&stored) {
            return Ok(tensor);
        }
        Err(match self.unread.get(&stored) {
            Some(other) => Error::model(&self.folder, format!("`{stored}` is stored as {other:?}"))
                .help("weights in f32, bf16 or f16 are read; quantised ones are not"),
            None => Error::model(&self.folder, format!("the weights have no tensor `{stored}`"))
                .help("config.json and the weights are of different models, or a file of the weights is missing"),
        })
    }

    /// Whether the folder has an output head or can use its embeddings as one.
    pub fn has_head(&self, config: &Config) -> bool {
        config.tied || self.tensors.contains_key("lm_head.weight")
    }
}

/// The safetensors files of a folder.
fn files(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let index = folder.join("model.safetensors.index.json");
    if !index.exists() {
        let whole = folder.join("model.safetensors");
        if !whole.exists() && folder.join("pytorch_model.bin").exists() {
            return Err(Error::model(folder, "the weights are in pytorch_model.bin, which is not read here")
                .help("transformers writes safetensors: AutoModel.from_pretrained(folder).save_pretrained(another)"));
        }
        return Ok(vec![whole]);
    }
    let text = fs::read_to_string(&index).map_err(|e| Error::io("read", &index, e))?;
    let parsed: Index = serde_json::from_str(&text)
        .map_err(|e| Error::model(&index, format!("not an index of weights: {e}")).help("copy the file again"))?;
    let mut names: Vec<String> = parsed.weight_map.into_values().collect();
    names.sort();
    names.dedup();
    if let Some(name) = names.iter().find(|n| n.contains(['/', '\\'])) {
        return Err(Error::model(&index, format!("names `{name}`, which is outside the folder"))
            .help("the files of the weights lie beside their index"));
    }
    Ok(names.into_iter().map(|name| folder.join(name)).collect())
}

fn map_file(
    path: &Path,
    tensors: &mut HashMap<String, Tensor>,
    unread: &mut HashMap<String, Dtype>,
) -> Result<(), Error> {
    let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
    // SAFETY: a map is only unsound if the file changes while it is read; model folders are published read-only, and
    // whoever overwrites one under a running process gets wrong numbers, as with any program that maps weights.
    let map = Arc::new(unsafe { Mmap::map(&file) }.map_err(|e| Error::io("map", path, e))?);
    let damaged = |what: String| {
        Error::model(path, what).help("the file may be cut short or still being written; copy or download it again")
    };
    let parsed = SafeTensors::deserialize(&map).map_err(|e| damaged(format!("not a whole safetensors file: {e}")))?;
    for (name, view) in parsed.iter() {
        let dtype = match view.dtype() {
            Dtype::F32 => FloatType::F32,
            Dtype::BF16 => FloatType::Bf16,
            Dtype::F16 => FloatType::F16,
            // An error only if it is asked for: buffers of numbers 0, 1, 2, … are saved beside weights.
            other => {
                unread.insert(name.to_owned(), other);
                continue;
            }
        };
        let start = view.data().as_ptr() as usize - map.as_ptr() as usize;
        let end = start + view.data().len();
        let tensor = Tensor { file: Arc::clone(&map), start, end, dtype, shape: view.shape().to_vec() };
        if tensors.insert(name.to_owned(), tensor).is_some() {
            return Err(damaged(format!("`{name}` is in two files of the weights")));
        }
    }
    Ok(())
}

impl Tensor {
    fn bytes(&self) -> &[u8] {
        &self.file[self.start..self.end]
    }

    /// The elements from `first` on, as many as `out` has room for, in f32.
    ///
    /// # Panics
    /// Beyond the end of the tensor: a defect of the caller, who knows the checked shape.
    pub fn read(&self, first: usize, out: &mut [f32]) {
        match self.dtype {
            FloatType::F32 => convert(&self.bytes()[4 * first..], out, f32::from_le_bytes),
            FloatType::Bf16 => convert(&self.bytes()[2 * first..], out, |b| bf16::from_le_bytes(b).to_f32()),
            FloatType::F16 => convert(&self.bytes()[2 * first..], out, |b| f16::from_le_bytes(b).to_f32()),
        }
    }

    /// Gives the pages that reading took back to the system; the next read fetches them again. Weights that were
    /// packed would otherwise count twice.
    fn release(&self) {
        #[cfg(unix)]
        // SAFETY: the map is of a file and read-only, so dropping its pages loses nothing.
        let _ = unsafe {
            self.file.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, self.start, self.end - self.start)
        };
    }

    /// A vector.
    pub fn vector(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.shape.iter().product()];
        self.read(0, &mut out);
        out
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The tensor on a device, in another type if need be.
    pub fn on(&self, device: &Device, dtype: DType) -> Result<candle_core::Tensor, candle_core::Error> {
        candle_core::Tensor::from_raw_buffer(self.bytes(), self.dtype.into(), &self.shape, device)?.to_dtype(dtype)
    }
}

fn convert<const N: usize>(bytes: &[u8], out: &mut [f32], value: impl Fn([u8; N]) -> f32) {
    let (chunks, _) = bytes.as_chunks::<N>();
    assert!(chunks.len() >= out.len(), "a tensor is read beyond its end");
    for (out, chunk) in out.iter_mut().zip(chunks) {
        *out = value(*chunk);
    }
}

/// Packs matrices `[out, in]` of one width below each other as one matrix for `x · Wᵀ`.
pub fn pack(matrices: &[&Tensor]) -> Panels {
    let inner = matrices.first().map_or(0, |m| m.shape[1]);
    let starts: Vec<usize> = matrices
        .iter()
        .scan(0, |at, m| {
            let start = *at;
            *at += m.shape[0];
            Some(start)
        })
        .collect();
    let cols = matrices.iter().map(|m| m.shape[0]).sum();
    let mut packed = Panels::zeros(inner, cols);
    let panels: Vec<&mut [f32]> = packed.panels_mut().collect();
    panels.into_par_iter().enumerate().for_each(|(index, panel)| {
        let mut row = vec![0.0; inner];
        for lane in 0..WIDTH.min(cols - index * WIDTH) {
            let column = index * WIDTH + lane;
            let which = starts.partition_point(|start| *start <= column) - 1;
            matrices[which].read((column - starts[which]) * inner, &mut row);
            for (slot, value) in panel[lane..].iter_mut().step_by(WIDTH).zip(&row) {
                *slot = *value;
            }
        }
    });
    matrices.iter().for_each(|matrix| matrix.release());
    packed
}
