//! From a file to a tree of plain values: size, encoding, YAML syntax, duplicate keys, merge keys (`<<`), and the
//! file that a file `extends`. Bounded in time and memory whatever the file holds.

use std::{
    fmt,
    fs::{self, File},
    io::Read,
    path::{Path, PathBuf},
    sync::Arc,
};

use saphyr_parser::{Event, Marker, Parser, ScanError};
use serde::de::{DeserializeSeed, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use super::{
    hint,
    mistake::{Mistake, PipelineError, PipelineErrors, path},
    places::{SourceFile, Sources},
};

/// Largest pipeline file: 40,000 stages fit.
const MAX_BYTES: u64 = 8 << 20;
/// Most memory that values may take once aliases are expanded.
const MAX_EXPANDED: usize = 256 << 20;
/// Deepest nesting; YAML readers need this bound to be fast on any input.
const MAX_DEPTH: usize = 100;
/// Longest chain of files that extend each other.
const MAX_EXTENDS: usize = 8;

/// The merged tree of a file and those it extends.
pub(crate) struct Tree {
    pub root: Map<String, Value>,
    pub sources: Sources,
    pub mistakes: Vec<Mistake>,
}

/// Reads `file`, and the files that it extends, into one tree.
///
/// # Errors
/// A file cannot be read, or is not YAML: nothing more can be said about it then.
pub(crate) fn read(file: &Path) -> Result<Tree, PipelineErrors> {
    let mut tree = Tree { root: Map::new(), sources: Sources::default(), mistakes: Vec::new() };
    let mut layers: Vec<Map<String, Value>> = Vec::new();
    let mut next = Some(file.to_owned());
    while let Some(at) = next.take() {
        let source = match read_text(&at) {
            Ok(text) => SourceFile::new(at.clone(), text),
            Err(error) if layers.is_empty() => return Err(error),
            Err(error) => {
                let message = error.errors.into_iter().next().map(|e| e.message).unwrap_or_default();
                tree.mistakes.push(Mistake::value(&path(&["extends"]), message));
                break;
            }
        };
        let (mut root, mistakes) = parse(&source)?;
        tree.sources.files.push(Arc::new(source));
        tree.mistakes.extend(mistakes);
        match root.shift_remove("extends") {
            None => {}
            Some(Value::String(base)) => {
                let base = at.parent().unwrap_or(Path::new("")).join(base);
                let same = |other: &Arc<SourceFile>| same_file(&other.path, &base);
                if tree.sources.files.iter().any(same) || tree.sources.files.len() >= MAX_EXTENDS {
                    let message = format!("`{}` extends itself, or too many files extend each other", base.display());
                    tree.mistakes.push(Mistake::value(&path(&["extends"]), message));
                } else {
                    next = Some(base);
                }
            }
            Some(_) => {
                let message = "expected the path of a pipeline file, relative to this one";
                tree.mistakes.push(Mistake::value(&path(&["extends"]), message));
            }
        }
        layers.push(root);
    }
    while let Some(layer) = layers.pop() {
        if tree.root.is_empty() {
            tree.root = layer;
        } else {
            lay_over(&mut tree.root, layer, 0);
        }
    }
    Ok(tree)
}

fn same_file(a: &Path, b: &Path) -> bool {
    match (a.canonicalize(), b.canonicalize()) {
        (Ok(a), Ok(b)) => a == b,
        _ => a == b,
    }
}

/// Lays a file over the one it extends: maps are merged, `null` removes, anything else replaces. A stage that names
/// another kind (`uses`) replaces the stage whole, since nothing of the old one's `with` would fit.
fn lay_over(base: &mut Map<String, Value>, layer: Map<String, Value>, depth: usize) {
    for (key, value) in layer {
        match (base.get_mut(&key), value) {
            (_, Value::Null) => {
                base.shift_remove(&key);
            }
            (Some(Value::Object(under)), Value::Object(over)) if !other_kind(under, &over, depth) => {
                lay_over(under, over, depth + 1);
            }
            (_, value) => {
                base.insert(key, value);
            }
        }
    }
}

/// Whether both are stages (two levels down), of different kinds.
fn other_kind(under: &Map<String, Value>, over: &Map<String, Value>, depth: usize) -> bool {
    depth == 1 && over.get("uses").is_some_and(|uses| under.get("uses").is_some_and(|old| old != uses))
}

pub(super) fn read_text(file: &Path) -> Result<String, PipelineErrors> {
    let shown = file.display();
    let cannot = |e: std::io::Error| {
        let help = (e.kind() == std::io::ErrorKind::NotFound).then(|| absent_help(file));
        PipelineErrors::one(format!("cannot read `{shown}`: {e}"), help)
    };
    let opened = File::open(file).map_err(cannot)?;
    let metadata = opened.metadata().map_err(cannot)?;
    if metadata.is_dir() {
        let help = "name the pipeline file in it".to_owned();
        return Err(PipelineErrors::one(format!("`{shown}` is a folder"), Some(help)));
    }
    let mut bytes = Vec::with_capacity(metadata.len().min(MAX_BYTES) as usize + 1);
    opened.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(cannot)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(PipelineErrors::one(
            format!("`{shown}` is larger than {} MiB, which no pipeline file is", MAX_BYTES >> 20),
            Some("is it the right file?".to_owned()),
        ));
    }
    match String::from_utf8(bytes) {
        Ok(text) => Ok(text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text)),
        Err(error) => {
            let good = error.utf8_error().valid_up_to();
            let bytes = error.as_bytes();
            let line = bytes[..good].iter().filter(|b| **b == b'\n').count() + 1;
            let start = bytes[..good].iter().rposition(|b| *b == b'\n').map_or(0, |i| i + 1);
            let column = String::from_utf8_lossy(&bytes[start..good]).chars().count();
            let source = SourceFile::new(file.to_owned(), String::from_utf8_lossy(bytes).into_owned());
            Err(PipelineErrors::new(vec![PipelineError {
                message: "the file is not UTF-8 text".to_owned(),
                help: Some(format!("the byte 0x{:02x} starts no character; save the file as UTF-8", bytes[good])),
                place: Some(source.place_at(line, column, 1)),
            }]))
        }
    }
}

/// What a file that is not there may have been meant to be.
fn absent_help(file: &Path) -> String {
    let folder = file.parent().filter(|f| !f.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let names: Vec<String> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.ends_with(".yaml") || name.ends_with(".yml"))
        .collect();
    let wanted = file.file_name().unwrap_or_default().to_string_lossy();
    match hint::nearest(&wanted, names.iter().map(String::as_str)) {
        Some(near) => format!("did you mean `{}`?", file.with_file_name(near).display()),
        None => "paths are relative to the folder that you run `grlm` in".to_owned(),
    }
}

/// The top-level map of a file, with mistakes that do not stop the reading.
fn parse(source: &SourceFile) -> Result<(Map<String, Value>, Vec<Mistake>), PipelineErrors> {
    check_depth(source)?;
    let mut reader = Reader { left: MAX_EXPANDED, path: Vec::new(), mistakes: Vec::new() };
    let value = NodeSeed(&mut reader)
        .deserialize(serde_yaml::Deserializer::from_str(&source.text))
        .map_err(|e| syntax_error(source, &e))?;
    match value {
        Value::Object(map) => Ok((map, reader.mistakes)),
        Value::Null => Err(empty(source)),
        _ => Err(PipelineErrors::new(vec![PipelineError {
            message: "a pipeline file is a map with the keys `name` and `stages`".to_owned(),
            help: None,
            place: Some(source.place_at(1, 0, usize::MAX)),
        }])),
    }
}

/// A value of the command line, by the rules for those of a file.
///
/// # Errors
/// It is not YAML, or not a number that parameters can have; in words.
pub(super) fn argument(text: &str) -> Result<Value, String> {
    let mut reader = Reader { left: MAX_EXPANDED, path: Vec::new(), mistakes: Vec::new() };
    let value = NodeSeed(&mut reader)
        .deserialize(serde_yaml::Deserializer::from_str(text))
        .map_err(|e| format!("not a YAML value: {e}"))?;
    reader.mistakes.pop().map_or(Ok(value), |mistake| Err(mistake.message))
}

fn empty(source: &SourceFile) -> PipelineErrors {
    PipelineErrors::one(
        format!("`{}` is empty", source.path.display()),
        Some("a pipeline file has the keys `name` and `stages`; `pipelines/quickstart.yaml` is an example".to_owned()),
    )
}

/// Refuses deep nesting before the YAML reader, whose time is quadratic in it, sees the text. The exact count costs
/// a parse of its own, so it is taken only where the number of unclosed brackets says that it might matter.
fn check_depth(source: &SourceFile) -> Result<(), PipelineErrors> {
    let (mut open, mut most) = (0usize, 0usize);
    for byte in source.text.bytes() {
        match byte {
            b'[' | b'{' => open += 1,
            b']' | b'}' => open = open.saturating_sub(1),
            _ => {}
        }
        most = most.max(open);
    }
    if most <= MAX_DEPTH {
        return Ok(());
    }
    let mut depth = 0usize;
    for event in Parser::new_from_str(&source.text) {
        // The reader would say it better, but perhaps only after minutes.
        let (event, span) = event.map_err(|e| unread(source, &e))?;
        match event {
            Event::SequenceStart(..) | Event::MappingStart(..) => depth += 1,
            Event::SequenceEnd | Event::MappingEnd => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > MAX_DEPTH {
            return Err(too_deep(source, &span.start));
        }
    }
    Ok(())
}

fn too_deep(source: &SourceFile, at: &Marker) -> PipelineErrors {
    PipelineErrors::new(vec![PipelineError {
        message: format!("values are nested more than {MAX_DEPTH} deep"),
        help: Some("is a bracket left open?".to_owned()),
        place: Some(source.place_at(at.line(), at.col(), 1)),
    }])
}

/// What the quick parser says of a text with many open brackets.
fn unread(source: &SourceFile, error: &ScanError) -> PipelineErrors {
    if error.info().contains("recursion limit") {
        return too_deep(source, error.marker());
    }
    PipelineErrors::new(vec![PipelineError {
        message: format!("not valid YAML: {}", error.info()),
        help: None,
        place: Some(source.place_at(error.marker().line(), error.marker().col(), 1)),
    }])
}

fn syntax_error(source: &SourceFile, error: &serde_yaml::Error) -> PipelineErrors {
    let text = error.to_string();
    let (line, column) = error.location().map_or((1, 0), |l| (l.line(), l.column().saturating_sub(1)));
    // The reader writes the place into its message, too.
    let mut message = text;
    while let Some(at) = message.find(" at line ") {
        let rest = &message[at + " at line ".len()..];
        let tail = rest.find([',', ';']).map_or("", |i| &rest[i..]).to_owned();
        message.truncate(at);
        message.push_str(&tail);
    }
    let help = syntax_help(&error.to_string());
    PipelineErrors::new(vec![PipelineError {
        message: format!("not valid YAML: {message}"),
        help,
        place: Some(source.place_at(line, column, 1)),
    }])
}

/// What to do about the reader's message. It tells where it began to read what it could not finish.
fn syntax_help(message: &str) -> Option<String> {
    let begun = |what: &str| {
        let (line, column) = message.split_once(what)?.1.strip_prefix(" at line ")?.split_once(" column ")?;
        let column: String = column.chars().take_while(char::is_ascii_digit).collect();
        Some(format!("line {line}, column {column}"))
    };
    let has = |words: &str| message.contains(words);
    if has("repetition limit") || has(TOO_MUCH) {
        Some("aliases (`*name`) that repeat aliases grow without bound".to_owned())
    } else if has("tab") || has("cannot start any token") {
        Some("indent with spaces; quote text that starts with a special character".to_owned())
    } else if has("mapping values are not allowed") {
        let help = "is the line indented differently from the keys beside it? Text with `: ` in it needs quotes";
        Some(help.to_owned())
    } else if let Some((bracket, place)) = [("{", "a flow mapping"), ("[", "a flow sequence")]
        .into_iter()
        .find_map(|(bracket, what)| Some((bracket, begun(&format!("while parsing {what}"))?)))
    {
        Some(format!("is the `{bracket}` of {place} closed, and is there a comma between what stands in it?"))
    } else if let Some(place) = begun("while scanning a quoted scalar") {
        Some(format!("is the quote of {place} closed?"))
    } else if has("did not find expected") {
        Some(
            "is the line indented differently from those beside it, or a bracket or quote left open above it?"
                .to_owned(),
        )
    } else {
        None
    }
}

const TOO_MUCH: &str = "the values take too much memory";

/// State of one reading.
struct Reader {
    /// Bytes that values may still take.
    left: usize,
    path: Vec<String>,
    mistakes: Vec<Mistake>,
}

impl Reader {
    fn spend<E: serde::de::Error>(&mut self, bytes: usize) -> Result<(), E> {
        self.left = self.left.checked_sub(bytes + 48).ok_or_else(|| E::custom(TOO_MUCH))?;
        Ok(())
    }
}

struct NodeSeed<'r>(&'r mut Reader);

impl<'de> DeserializeSeed<'de> for NodeSeed<'_> {
    type Value = Value;

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for NodeSeed<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a plain value (tags such as `!name` are not read)")
    }

    fn visit_bool<E: serde::de::Error>(self, value: bool) -> Result<Value, E> {
        self.0.spend(0)?;
        Ok(Value::Bool(value))
    }

    fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<Value, E> {
        self.0.spend(0)?;
        Ok(value.into())
    }

    fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<Value, E> {
        self.0.spend(0)?;
        Ok(value.into())
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Value, E> {
        self.0.spend(0)?;
        Ok(Number::from_f64(value).map_or_else(
            || {
                self.0.mistakes.push(Mistake::value(&self.0.path, "not a finite number"));
                Value::Null
            },
            Value::Number,
        ))
    }

    fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<Value, E> {
        self.0.spend(value.len())?;
        Ok(Value::String(value.to_owned()))
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<Value, E> {
        self.0.spend(0)?;
        Ok(Value::Null)
    }

    /// An empty document.
    fn visit_none<E: serde::de::Error>(self) -> Result<Value, E> {
        self.visit_unit()
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        self.0.spend(0)?;
        let mut list = Vec::new();
        loop {
            self.0.path.push(list.len().to_string());
            let next = access.next_element_seed(NodeSeed(self.0))?;
            self.0.path.pop();
            match next {
                Some(value) => list.push(value),
                None => return Ok(Value::Array(list)),
            }
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        self.0.spend(0)?;
        let mut map = Map::new();
        let mut merged = None;
        while let Some(key) = access.next_key::<String>()? {
            self.0.spend(key.len())?;
            self.0.path.push(key.clone());
            let value = access.next_value_seed(NodeSeed(self.0))?;
            if map.contains_key(&key) {
                let message = format!("`{key}` is written twice");
                self.0.mistakes.push(Mistake::key(&self.0.path, message).help("remove one of them"));
            }
            self.0.path.pop();
            if key == "<<" {
                merged = Some(value);
            } else {
                map.insert(key, value);
            }
        }
        if let Some(merged) = merged {
            merge(&mut map, merged).map_err(A::Error::custom)?;
        }
        Ok(Value::Object(map))
    }
}

/// A merge key: what the map does not say itself comes from another map, or from the first of a list that says it.
fn merge(map: &mut Map<String, Value>, merged: Value) -> Result<(), &'static str> {
    let maps = match merged {
        Value::Array(list) => list,
        one => vec![one],
    };
    for one in maps {
        let Value::Object(fields) = one else { return Err("`<<` takes a map or a list of maps") };
        for (key, value) in fields {
            map.entry(key).or_insert(value);
        }
    }
    Ok(())
}

/// The file's own name without its ending: the pipeline's name if it gives none.
pub(crate) fn stem(file: &Path) -> String {
    PathBuf::from(file.file_name().unwrap_or_default()).with_extension("").display().to_string()
}
