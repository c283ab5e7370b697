//! Model folders (`config.json`, `model.safetensors`) and single-file checkpoints.
//!
//! Files are written beside their place, synced and renamed, so that a kill or a full disk leaves the previous one.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, Write},
    path::Path,
};

use safetensors::{Dtype, SafeTensors, tensor::TensorView};

use super::{SasrecError, config::Architecture, model::Model, network::Layout};

const WEIGHTS: &str = "model.safetensors";
const CONFIG: &str = "config.json";
const ITEMS: &str = "item_embedding.weight";
/// Where a checkpoint keeps what is not a tensor, as JSON.
const STATE: &str = "state";

/// A named tensor to write.
pub struct Named<'a> {
    pub name: String,
    pub shape: Vec<usize>,
    pub values: &'a [f32],
}

impl<'a> Named<'a> {
    pub fn flat(name: &str, values: &'a [f32]) -> Self {
        Self { name: name.to_owned(), shape: vec![values.len()], values }
    }
}

/// What a file held.
pub struct Loaded {
    tensors: HashMap<String, (Vec<usize>, Vec<f32>)>,
    pub state: Option<String>,
}

impl Loaded {
    /// Takes a tensor of the given shape out.
    pub fn take(&mut self, path: &Path, name: &str, shape: &[usize]) -> Result<Vec<f32>, SasrecError> {
        match self.tensors.remove(name) {
            None => Err(format(path, format!("tensor `{name}` is missing"))),
            Some((found, _)) if found != shape => {
                Err(format(path, format!("tensor `{name}` has shape {found:?}, expected {shape:?}")))
            }
            Some((_, values)) => Ok(values),
        }
    }
}

pub fn format(path: &Path, reason: impl Into<String>) -> SasrecError {
    SasrecError::Format { path: path.to_owned(), reason: reason.into() }
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SasrecError {
    move |source| SasrecError::Io { action, path: path.to_owned(), source }
}

fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), SasrecError> {
    let staged = path.with_extension("partial");
    let write = || {
        let mut file = File::create(&staged)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&staged, path)
    };
    write().map_err(|source| {
        let _ = fs::remove_file(&staged);
        SasrecError::Io { action: "write", path: path.to_owned(), source }
    })
}

/// Writes a safetensors file, atomically.
pub fn write_tensors(path: &Path, tensors: &[Named], state: Option<String>) -> Result<(), SasrecError> {
    let bytes: Vec<Vec<u8>> = tensors.iter().map(|t| t.values.iter().flat_map(|x| x.to_le_bytes()).collect()).collect();
    let mut views = Vec::with_capacity(tensors.len());
    for (tensor, bytes) in tensors.iter().zip(&bytes) {
        let view = TensorView::new(Dtype::F32, tensor.shape.clone(), bytes).map_err(|e| format(path, e.to_string()))?;
        views.push((tensor.name.as_str(), view));
    }
    let metadata = state.map(|s| HashMap::from([(STATE.to_owned(), s)]));
    let file = safetensors::serialize(views, metadata).map_err(|e| format(path, e.to_string()))?;
    write_whole(path, &file)
}

/// Reads all `f32` tensors of a safetensors file.
pub fn read_tensors(path: &Path) -> Result<Loaded, SasrecError> {
    let bytes = fs::read(path).map_err(io_error("read", path))?;
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| format(path, e.to_string()))?;
    let state = header.metadata().as_ref().and_then(|m| m.get(STATE)).cloned();
    let file = SafeTensors::deserialize(&bytes).map_err(|e| format(path, e.to_string()))?;
    let mut tensors = HashMap::new();
    for (name, view) in file.iter() {
        if view.dtype() != Dtype::F32 {
            return Err(format(path, format!("tensor `{name}` is {:?}, expected F32", view.dtype())));
        }
        let values = view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        tensors.insert(name.to_owned(), (view.shape().to_vec(), values));
    }
    Ok(Loaded { tensors, state })
}

impl Model {
    /// Writes the model into a folder, which is created if need be.
    ///
    /// # Errors
    /// The disk is full, or the like.
    pub fn save(&self, folder: &Path) -> Result<(), SasrecError> {
        fs::create_dir_all(folder).map_err(io_error("create", folder))?;
        let mut tensors = vec![Named {
            name: ITEMS.to_owned(),
            shape: vec![self.architecture.items, self.architecture.hidden],
            values: &self.items,
        }];
        tensors.extend(self.layout.tensors().iter().map(|t| Named {
            name: t.name.clone(),
            shape: t.shape.clone(),
            values: &self.parameters[t.place.clone()],
        }));
        write_tensors(&folder.join(WEIGHTS), &tensors, None)?;
        let path = folder.join(CONFIG);
        let config = serde_json::to_vec_pretty(&self.architecture).map_err(|e| format(&path, e.to_string()))?;
        write_whole(&path, &config)
    }

    /// Reads what [`Model::save`] wrote.
    ///
    /// # Errors
    /// A file is missing, cut short, or does not fit to the configuration.
    pub fn load(folder: &Path) -> Result<Self, SasrecError> {
        let path = folder.join(CONFIG);
        let config = fs::read(&path).map_err(io_error("read", &path))?;
        let architecture: Architecture = serde_json::from_slice(&config).map_err(|e| format(&path, e.to_string()))?;
        architecture.check()?;
        let path = folder.join(WEIGHTS);
        let mut loaded = read_tensors(&path)?;
        let items = loaded.take(&path, ITEMS, &[architecture.items, architecture.hidden])?;
        let layout = Layout::new(&architecture);
        let mut parameters = vec![0.0; layout.len()];
        for tensor in layout.tensors() {
            parameters[tensor.place.clone()].copy_from_slice(&loaded.take(&path, &tensor.name, &tensor.shape)?);
        }
        Ok(Self { architecture, layout, parameters, items })
    }
}
