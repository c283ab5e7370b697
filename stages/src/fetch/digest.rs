//! The digests by which publishers name a file's content.

use std::{
    fmt,
    fs::File,
    io::{self, Read},
    path::Path,
    str::FromStr,
};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use sha1::Digest as _;

use crate::{StageError, artifact::text};

/// How a digest is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Method {
    Blake3,
    Sha256,
    /// SHA-1 of `blob SIZE\0` and the content: `git hash-object`.
    GitBlob,
}

impl Method {
    const ALL: [(&'static str, Self, usize); 3] =
        [("blake3", Self::Blake3, 64), ("sha256", Self::Sha256, 64), ("git-blob", Self::GitBlob, 40)];

    fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, method, _)| *method == self).map_or("", |(name, ..)| name)
    }
}

/// A file's digest, written `METHOD:HEX`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest {
    method: Method,
    /// Lower case.
    hex: String,
}

/// The content is not the one wanted.
#[derive(Debug)]
pub enum CheckError {
    Different { method: &'static str, found: String, wanted: String },
    Read(StageError),
}

impl CheckError {
    /// The error of a stage, about the file that came from `place`.
    pub fn of(self, place: &str) -> StageError {
        match self {
            Self::Different { method, found, wanted } => StageError::input(
                place,
                format!("not the file that is wanted: its {method} is {found}, wanted {wanted}"),
            )
            .help("the publisher changed the file, or the digest belongs to another one"),
            Self::Read(error) => error,
        }
    }
}

impl Digest {
    /// The BLAKE3 digest of a file.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn blake3_of(path: &Path) -> Result<Self, StageError> {
        let hex = hash(Method::Blake3, path).map_err(|e| text::open_error(path, e))?;
        Ok(Self { method: Method::Blake3, hex })
    }

    /// Compares a file with this digest.
    ///
    /// # Errors
    /// It has another one, or cannot be read.
    pub fn check(&self, path: &Path) -> Result<(), CheckError> {
        let found = hash(self.method, path).map_err(|e| CheckError::Read(text::open_error(path, e)))?;
        if found == self.hex {
            return Ok(());
        }
        Err(CheckError::Different { method: self.method.name(), found, wanted: self.hex.clone() })
    }
}

fn hash(method: Method, path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    Ok(match method {
        Method::Blake3 => {
            let mut hasher = blake3::Hasher::new();
            hasher.update_reader(file)?;
            hasher.finalize().to_hex().to_string()
        }
        Method::Sha256 => {
            let mut hasher = sha2::Sha256::new();
            read_into(&mut file, |bytes| hasher.update(bytes))?;
            format!("{:x}", hasher.finalize())
        }
        Method::GitBlob => {
            let mut hasher = sha1::Sha1::new();
            hasher.update(format!("blob {}\0", file.metadata()?.len()));
            read_into(&mut file, |bytes| hasher.update(bytes))?;
            format!("{:x}", hasher.finalize())
        }
    })
}

fn read_into(file: &mut File, mut update: impl FnMut(&[u8])) -> io::Result<()> {
    let mut buffer = vec![0; 256 << 10];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(()),
            n => update(&buffer[..n]),
        }
    }
}

impl FromStr for Digest {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wanted = "a digest is written `blake3:HEX`, `sha256:HEX` or `git-blob:HEX`";
        let (name, hex) = text.split_once(':').ok_or(wanted)?;
        let (_, method, digits) = Method::ALL.into_iter().find(|(known, ..)| *known == name).ok_or(wanted)?;
        if hex.len() != digits || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(format!("`{name}` has {digits} hexadecimal digits"));
        }
        Ok(Self { method, hex: hex.to_ascii_lowercase() })
    }
}

impl TryFrom<String> for Digest {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.method.name(), self.hex)
    }
}

impl JsonSchema for Digest {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Digest".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "pattern": "^(blake3:[0-9a-fA-F]{64}|sha256:[0-9a-fA-F]{64}|git-blob:[0-9a-fA-F]{40})$" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_read_strictly() {
        let upper = format!("sha256:{}", "AB".repeat(32));
        assert_eq!(upper.parse::<Digest>().unwrap().to_string(), upper.to_lowercase().replace("SHA", "sha"));
        for wrong in ["", "ab", "md5:ab", "sha256:ab", "git-blob:zz", &format!("blake3:{}", "é".repeat(32))] {
            assert!(wrong.parse::<Digest>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn known_digests_of_the_empty_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for known in [
            "blake3:af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262",
            "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
            "git-blob:e69de29bb2d1d6434b8b29ae775ad8c2e48c5391",
        ] {
            assert!(known.parse::<Digest>().unwrap().check(file.path()).is_ok(), "{known}");
        }
    }
}
