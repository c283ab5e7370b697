//! What an artifact is: a file or a folder, by digest. A folder's digest is that of its manifest, which is itself a
//! blob: a text with one line per file, sorted by path bytes.
//!
//! ```text
//! grlm-folder 1
//! <64 hex digits> <size> <path>
//! - 0 <path of an empty folder>
//! ```
//!
//! `\` and line feed in a path are written `\\` and `\n`. Modes, owners and times are not part of the content.

use std::fmt::Write;

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::{Result, StoreError};

/// Whether an artifact is one file or a folder of files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ContentKind {
    File,
    Folder,
}

/// An artifact's content. For a file `digest` is what `b3sum` prints; for a folder it is its manifest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Content {
    pub digest: Digest,
    pub kind: ContentKind,
    /// Bytes of the file, or of all files of the folder.
    pub size: u64,
    /// 1 for a file; how many the folder holds, at any depth.
    pub files: u64,
}

/// A file of a folder, or (without a digest) an empty folder in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FolderEntry {
    /// Relative, `/` between names, none of them empty, `.` or `..`.
    pub path: String,
    pub digest: Option<Digest>,
    pub size: u64,
}

/// The files of a folder, sorted by path bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FolderManifest {
    entries: Vec<FolderEntry>,
}

const HEADER: &str = "grlm-folder 1";

impl FolderManifest {
    /// `entries` in any order.
    pub(crate) fn new(mut entries: Vec<FolderEntry>) -> FolderManifest {
        entries.sort_unstable_by(|a, b| a.path.as_bytes().cmp(b.path.as_bytes()));
        FolderManifest { entries }
    }

    pub fn entries(&self) -> &[FolderEntry] {
        &self.entries
    }

    /// The blob's text.
    pub fn to_text(&self) -> String {
        let mut text = String::with_capacity(16 + self.entries.len() * 112);
        text.push_str(HEADER);
        text.push('\n');
        for entry in &self.entries {
            match entry.digest {
                Some(digest) => text.push_str(&digest.hex()),
                None => text.push('-'),
            }
            // Writing to a string cannot fail.
            let _ = write!(text, " {} ", entry.size);
            if entry.path.contains(['\\', '\n']) {
                text.push_str(&entry.path.replace('\\', "\\\\").replace('\n', "\\n"));
            } else {
                text.push_str(&entry.path);
            }
            text.push('\n');
        }
        text
    }

    /// Reads a manifest, refusing paths that leave the folder and entries out of order. `digest` is for the error.
    pub fn parse(text: &[u8], digest: Digest) -> Result<FolderManifest> {
        let wrong = |line, what| StoreError::BadManifest { digest, line, what };
        let text = std::str::from_utf8(text).map_err(|_| wrong(0, "is not UTF-8"))?;
        let mut lines = text.split_terminator('\n').enumerate();
        match lines.next() {
            Some((_, HEADER)) => {}
            _ => return Err(wrong(1, "is not the header")),
        }
        let mut entries: Vec<FolderEntry> = Vec::new();
        for (index, line) in lines {
            let wrong = |what| wrong(index + 1, what);
            let mut fields = line.splitn(3, ' ');
            let (Some(hex), Some(size), Some(path)) = (fields.next(), fields.next(), fields.next()) else {
                return Err(wrong("has fewer than three fields"));
            };
            let digest = match hex {
                "-" => None,
                hex => Some(hex.parse().map_err(|_| wrong("does not begin with a digest"))?),
            };
            let size = size.parse().map_err(|_| wrong("has no size"))?;
            let path = unescape(path).ok_or_else(|| wrong("has a bad escape"))?;
            if path.starts_with('/')
                || path.split('/').any(|name| matches!(name, "" | "." | ".."))
                || path.contains('\0')
            {
                return Err(wrong("has a path that leaves the folder"));
            }
            if entries.last().is_some_and(|last| last.path.as_bytes() >= path.as_bytes()) {
                return Err(wrong("is out of order"));
            }
            entries.push(FolderEntry { path, digest, size });
        }
        Ok(FolderManifest { entries })
    }

    /// What a record says about a folder with this manifest.
    pub fn content(&self) -> Content {
        self.content_of(Digest::of(self.to_text().as_bytes()))
    }

    pub(crate) fn content_of(&self, digest: Digest) -> Content {
        let size = self.entries.iter().fold(0u64, |sum, entry| sum.saturating_add(entry.size));
        let files = self.entries.iter().filter(|entry| entry.digest.is_some()).count() as u64;
        Content { digest, kind: ContentKind::Folder, size, files }
    }
}

fn unescape(path: &str) -> Option<String> {
    if !path.contains('\\') {
        return Some(path.to_owned());
    }
    let mut plain = String::with_capacity(path.len());
    let mut rest = path.chars();
    while let Some(character) = rest.next() {
        plain.push(match character {
            '\\' => match rest.next()? {
                '\\' => '\\',
                'n' => '\n',
                _ => return None,
            },
            other => other,
        });
    }
    Some(plain)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entry(path: &str, content: &[u8]) -> FolderEntry {
        FolderEntry { path: path.into(), digest: Some(Digest::of(content)), size: content.len() as u64 }
    }

    #[test]
    fn the_text_is_sorted_and_documented() {
        let empty = FolderEntry { path: "e".into(), digest: None, size: 0 };
        let manifest = FolderManifest::new(vec![entry("z", b"zz"), empty, entry("a b/c", b"1")]);
        let expected = format!("grlm-folder 1\n{} 1 a b/c\n- 0 e\n{} 2 z\n", Digest::of(b"1"), Digest::of(b"zz"));
        assert_eq!(manifest.to_text(), expected);
        let content = manifest.content();
        assert_eq!((content.size, content.files, content.kind), (3, 2, ContentKind::Folder));
        assert_eq!(content.digest, Digest::of(expected.as_bytes()));
    }

    #[test]
    fn hostile_manifests_are_refused() {
        let digest = Digest::of(b"");
        for body in [
            "x 1 a",
            "- 0",
            "- x a",
            "- 0 /a",
            "- 0 a/../b",
            "- 0 ..",
            "- 0 a//b",
            "- 0 b\n- 0 a",
            "- 0 a\n- 0 a",
            "- 0 a\\x",
            "- 0 a\\",
        ] {
            let text = format!("{HEADER}\n{body}\n");
            assert!(FolderManifest::parse(text.as_bytes(), digest).is_err(), "{body}");
        }
        assert!(FolderManifest::parse(b"", digest).is_err());
        assert!(FolderManifest::parse(b"\xff", digest).is_err());
    }

    proptest! {
        #[test]
        fn parse_reads_what_to_text_writes(paths in prop::collection::btree_set("[a-z\\\\\n é]{1,8}(/[a-z]{1,3})?", 0..12)) {
            let entries = paths.iter().filter(|path| !path.split('/').any(|n| n == "." || n == "..")).map(|path| entry(path, path.as_bytes())).collect();
            let manifest = FolderManifest::new(entries);
            let text = manifest.to_text();
            prop_assert_eq!(FolderManifest::parse(text.as_bytes(), Digest::of(b"")).unwrap(), manifest);
        }

        #[test]
        fn parse_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = FolderManifest::parse(&bytes, Digest::of(b""));
        }
    }
}
