//! Safetensors files of `f32` arrays, written and read in a stream: nothing is held twice.
//!
//! Files are written beside their place, synced and renamed, so that a kill or a full disk leaves the previous one.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{BufWriter, Write},
    path::Path,
};

use half::bf16;
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value, json};

use crate::Error;

/// Numbers converted at once.
const CHUNK: usize = 1 << 16;

/// A named array to write.
pub struct Named<'a> {
    pub name: &'a str,
    pub shape: &'a [usize],
    pub values: &'a [f32],
}

impl<'a> Named<'a> {
    /// A vector.
    pub fn flat(name: &'a str, values: &'a [f32], shape: &'a [usize; 1]) -> Self {
        Self { name, shape, values }
    }
}

/// The type in which numbers are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    F32,
    Bf16,
}

impl Stored {
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }

    /// As safetensors spells it.
    fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::Bf16 => "BF16",
        }
    }

    /// As `config.json` spells it.
    pub fn torch_name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
        }
    }
}

/// Writes a safetensors file, atomically.
///
/// # Errors
/// The disk is full, or the like; what stood at `path` before is still there.
pub fn write(path: &Path, tensors: &[Named], metadata: &[(&str, &str)], stored: Stored) -> Result<(), Error> {
    let staged = path.with_extension("partial");
    let written = (|| {
        let mut out = BufWriter::with_capacity(1 << 20, File::create(&staged)?);
        out.write_all(&header(tensors, metadata, stored))?;
        let mut bytes = Vec::with_capacity(CHUNK * stored.bytes());
        for chunk in tensors.iter().flat_map(|t| t.values.chunks(CHUNK)) {
            bytes.clear();
            match stored {
                Stored::F32 => chunk.iter().for_each(|x| bytes.extend(x.to_le_bytes())),
                Stored::Bf16 => chunk.iter().for_each(|x| bytes.extend(bf16::from_f32(*x).to_le_bytes())),
            }
            out.write_all(&bytes)?;
        }
        out.into_inner().map_err(|e| e.into_error())?.sync_all()?;
        fs::rename(&staged, path)
    })();
    written.map_err(|e| {
        let _ = fs::remove_file(&staged);
        Error::io("write", path, e)
    })
}

/// The length of the header, and the header, padded so that the numbers are aligned.
fn header(tensors: &[Named], metadata: &[(&str, &str)], stored: Stored) -> Vec<u8> {
    let mut all = Map::new();
    all.insert("__metadata__".into(), metadata.iter().map(|(k, v)| ((*k).to_owned(), Value::from(*v))).collect());
    let mut at = 0;
    for tensor in tensors {
        let end = at + tensor.values.len() * stored.bytes();
        let entry = json!({"dtype": stored.name(), "shape": tensor.shape, "data_offsets": [at, end]});
        all.insert(tensor.name.to_owned(), entry);
        at = end;
    }
    let mut text = Value::Object(all).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text);
    bytes
}

/// A checkpoint that was opened for reading.
pub struct Reader {
    map: Mmap,
    metadata: HashMap<String, String>,
}

impl Reader {
    /// # Errors
    /// The file cannot be read, or is cut short.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
        // SAFETY: checkpoints lie in the attempt's own folder and are replaced by renaming, never written in place.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io("map", path, e))?;
        let damaged = |e: safetensors::SafeTensorError| Error::model(path, format!("not a whole checkpoint: {e}"));
        SafeTensors::deserialize(&map).map_err(damaged)?;
        let (_, header) = SafeTensors::read_metadata(&map).map_err(damaged)?;
        let metadata = header.metadata().clone().unwrap_or_default();
        Ok(Self { map, metadata })
    }

    pub fn metadata(&self, name: &str) -> Option<&str> {
        self.metadata.get(name).map(String::as_str)
    }

    /// Reads an `f32` array into `out`.
    ///
    /// # Errors
    /// It is not there, or has another type or length.
    pub fn read(&self, path: &Path, name: &str, out: &mut [f32]) -> Result<(), Error> {
        let file = SafeTensors::deserialize(&self.map).map_err(|e| Error::model(path, e.to_string()))?;
        let view = file.tensor(name).map_err(|_| Error::model(path, format!("it has no array `{name}`")))?;
        let (chunks, rest) = view.data().as_chunks::<4>();
        if view.dtype() != Dtype::F32 || chunks.len() != out.len() || !rest.is_empty() {
            return Err(Error::model(path, format!("`{name}` is not of {} numbers", out.len())));
        }
        for (out, bytes) in out.iter_mut().zip(chunks) {
            *out = f32::from_le_bytes(*bytes);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        let (a, b) = (vec![1.5f32; CHUNK + 3], [-2.0f32, f32::MIN_POSITIVE]);
        let tensors = [Named { name: "a", shape: &[CHUNK + 3], values: &a }, Named::flat("b", &b, &[2])];
        write(&path, &tensors, &[("state", "{\"x\": 1}")], Stored::F32).unwrap();
        let reader = Reader::open(&path).unwrap();
        assert_eq!(reader.metadata("state"), Some("{\"x\": 1}"));
        let mut out = [0.0; 2];
        reader.read(&path, "b", &mut out).unwrap();
        assert_eq!(out, b);
        assert!(reader.read(&path, "a", &mut out).is_err());
        assert!(reader.read(&path, "c", &mut out).is_err());

        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        assert!(matches!(Reader::open(&path), Err(Error::Model { .. })));
    }

    /// `/dev/full` in place of the file beside it: every write fails as on a full disk.
    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_leaves_the_previous_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        let save = |value: f32| write(&path, &[Named::flat("a", &[value; 2], &[2])], &[], Stored::F32);
        save(1.0).unwrap();
        std::os::unix::fs::symlink("/dev/full", path.with_extension("partial")).unwrap();
        let error = save(2.0).unwrap_err();
        assert!(matches!(&error, Error::Io { source, .. } if source.raw_os_error() == Some(28)), "{error:?}");
        let mut out = [0.0; 2];
        Reader::open(&path).unwrap().read(&path, "a", &mut out).unwrap();
        assert_eq!(out, [1.0; 2]);
        save(3.0).unwrap();
    }
}
