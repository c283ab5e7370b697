//! Where a logical place stands in the text: spans of every key and value, read only when a mistake is shown.
//!
//! Knows the files that a pipeline was read from and, for values that a variant or `--set` put there, where
//! those were written.

use std::{
    collections::HashMap,
    ops::Range,
    path::PathBuf,
    sync::{Arc, OnceLock},
};

use saphyr_parser::{Event, Parser, Span};

use super::mistake::{KeyPath, Mark, Mistake, PipelineError, PipelineErrors, Place};

/// A file's text, and its spans once asked for.
#[derive(Debug)]
pub(crate) struct SourceFile {
    pub path: PathBuf,
    pub text: String,
    spans: OnceLock<Spans>,
}

impl SourceFile {
    pub fn new(path: PathBuf, text: String) -> Self {
        Self { path, text, spans: OnceLock::new() }
    }

    fn spans(&self) -> &Spans {
        self.spans.get_or_init(|| Spans::read(&self.text))
    }

    /// The place of a span given as 1-based line and 0-based column, both in characters.
    pub fn place_at(&self, line: usize, column: usize, width: usize) -> Place {
        let text = self.text.split('\n').nth(line.saturating_sub(1)).unwrap_or_default().trim_end_matches('\r');
        place(self.path.display().to_string(), line.max(1), text, column, width)
    }
}

/// Longest part of a line that is shown.
const EXCERPT: usize = 160;

/// `column` and `width` in characters of `line_text`.
fn place(file: String, line: usize, line_text: &str, column: usize, width: usize) -> Place {
    let characters = line_text.chars().count();
    let column = column.min(characters);
    let width = width.clamp(1, (characters - column).max(1));
    let (text, shift) = if characters > EXCERPT {
        let from = column.saturating_sub(EXCERPT / 4);
        (line_text.chars().skip(from).take(EXCERPT).collect::<String>(), from)
    } else {
        (line_text.to_owned(), 0)
    };
    let byte = |character: usize| text.char_indices().nth(character).map_or(text.len(), |(i, _)| i);
    let marked = byte(column - shift)..byte(column - shift + width);
    Place { file, line, column: column + 1, text, marked }
}

/// Where a value came from that is not written at its own logical place.
#[derive(Debug, Clone)]
pub(crate) enum Origin {
    /// Written in the file at this other logical place.
    File(KeyPath),
    /// Written on the command line, as `path=value`.
    Argument(String),
}

/// Everything needed to give mistakes their places.
#[derive(Debug, Clone, Default)]
pub(crate) struct Sources {
    /// The pipeline's own file first, then those it extends; shared by the variants of a sweep.
    pub files: Vec<Arc<SourceFile>>,
    /// What was laid over the files, oldest first: the logical place and where the new value is written.
    pub overlays: Vec<(KeyPath, Origin)>,
}

impl Sources {
    /// Places all mistakes, in the order of the text.
    pub fn report(&self, mut mistakes: Vec<Mistake>) -> PipelineErrors {
        let count = mistakes.len();
        // Placing is cheap, but 10,000 mistakes are not worth the user's time either.
        mistakes.truncate(PipelineErrors::SHOWN * 20);
        let mut placed: Vec<(Option<usize>, PipelineError)> = mistakes
            .into_iter()
            .map(|m| {
                let (file, place) = self.place_of(&m.path, &m.mark).unzip();
                (file, PipelineError { message: m.message, help: m.help, place })
            })
            .collect();
        placed.sort_by_key(|(file, e)| (*file, e.place.as_ref().map(|p| (p.line, p.column))));
        let mut errors = PipelineErrors::new(placed.into_iter().map(|(_, e)| e).collect());
        errors.count = count;
        errors
    }

    fn place_of(&self, path: &[String], mark: &Mark) -> Option<(usize, Place)> {
        for (target, origin) in self.overlays.iter().rev() {
            if let Some(rest) = path.strip_prefix(target.as_slice()) {
                match origin {
                    Origin::File(at) => {
                        let moved: KeyPath = at.iter().chain(rest).cloned().collect();
                        return self.place_in_files(&moved, mark);
                    }
                    Origin::Argument(text) => {
                        let line = text.lines().next().unwrap_or_default();
                        let (start, width) = needle_in(line, mark).unwrap_or((0, line.chars().count()));
                        return Some((usize::MAX, place("--set".to_owned(), 1, line, start, width)));
                    }
                }
            }
        }
        self.place_in_files(path, mark)
    }

    /// In the file that has most of the path; its own file if none has more.
    fn place_in_files(&self, path: &[String], mark: &Mark) -> Option<(usize, Place)> {
        let mut best: Option<(usize, usize)> = None;
        for (i, file) in self.files.iter().enumerate() {
            let depth = file.spans().depth(path);
            if best.is_none_or(|(_, d)| depth > d) {
                best = Some((i, depth));
            }
        }
        let (i, _) = best?;
        let file = &self.files[i];
        Some((i, file.spans().place(file, path, mark)))
    }
}

/// The marked words in `line`, as start and width in characters.
fn needle_in(line: &str, mark: &Mark) -> Option<(usize, usize)> {
    let Mark::Text(needle) = mark else { return None };
    let at = line.find(needle.as_str())?;
    Some((line[..at].chars().count(), needle.chars().count()))
}

/// The spans of one file: an arena, so that an alias is the node it stands for.
#[derive(Debug, Default)]
struct Spans {
    nodes: Vec<Node>,
}

#[derive(Debug)]
struct Node {
    /// 1-based lines, 0-based columns, in characters.
    start: (usize, usize),
    end: (usize, usize),
    children: Children,
}

#[derive(Debug)]
enum Children {
    None,
    List(Vec<usize>),
    Map(Vec<(String, usize, usize)>),
}

impl Spans {
    /// Reads as far as the text is YAML.
    fn read(text: &str) -> Self {
        let mut nodes: Vec<Node> = Vec::new();
        let mut open: Vec<(usize, Option<(String, usize)>)> = Vec::new();
        let mut anchors: HashMap<usize, usize> = HashMap::new();
        for event in Parser::new_from_str(text) {
            let Ok((event, span)) = event else { break };
            let (id, scalar, opens) = match event {
                Event::Alias(anchor) => match anchors.get(&anchor) {
                    Some(&id) => (id, None, false),
                    None => continue,
                },
                Event::Scalar(value, _, anchor, _) => {
                    let id = push(&mut nodes, span, Children::None);
                    anchors.insert(anchor, id);
                    (id, Some(value.into_owned()), false)
                }
                Event::SequenceStart(anchor, _) => {
                    let id = push(&mut nodes, span, Children::List(Vec::new()));
                    anchors.insert(anchor, id);
                    (id, None, true)
                }
                Event::MappingStart(anchor, _) => {
                    let id = push(&mut nodes, span, Children::Map(Vec::new()));
                    anchors.insert(anchor, id);
                    (id, None, true)
                }
                Event::SequenceEnd | Event::MappingEnd => {
                    if let Some((id, _)) = open.pop() {
                        nodes[id].end = (span.end.line(), span.end.col());
                    }
                    continue;
                }
                Event::DocumentEnd => break,
                Event::Nothing | Event::StreamStart | Event::StreamEnd | Event::DocumentStart(_) => continue,
            };
            if let Some((parent, key)) = open.last_mut() {
                match (&mut nodes[*parent].children, key.take()) {
                    (Children::List(list), _) => list.push(id),
                    (Children::Map(map), Some((name, key_id))) => map.push((name, key_id, id)),
                    (Children::Map(_), None) => *key = Some((scalar.unwrap_or_default(), id)),
                    (Children::None, _) => {}
                }
            }
            if opens {
                open.push((id, None));
            }
        }
        Self { nodes }
    }

    /// The child of a node, looked for among merged maps (`<<`) too: its key's node, if it has one, and its own.
    fn child(&self, node: usize, name: &str, budget: usize) -> Option<(Option<usize>, usize)> {
        match &self.nodes[node].children {
            Children::None => None,
            Children::List(list) => {
                if let Some(&id) = name.parse::<usize>().ok().and_then(|i| list.get(i)) {
                    return Some((None, id));
                }
                // The maps of a list of merged maps.
                list.iter().find_map(|&id| self.child(id, name, budget.checked_sub(1)?))
            }
            Children::Map(map) => {
                // The last of duplicates: it is the one to take away.
                if let Some((_, key, id)) = map.iter().rev().find(|(key, ..)| key == name) {
                    return Some((Some(*key), *id));
                }
                let (_, _, merged) = map.iter().find(|(key, ..)| key == "<<")?;
                self.child(*merged, name, budget.checked_sub(1)?)
            }
        }
    }

    /// The node at `path` or its nearest ancestor, with its key, and how many keys were found.
    fn find(&self, path: &[String]) -> Option<(Option<usize>, usize, usize)> {
        self.nodes.first()?;
        let (mut key, mut node) = (None, 0);
        for (depth, name) in path.iter().enumerate() {
            match self.child(node, name, 16) {
                Some((k, n)) => (key, node) = (k.or(key), n),
                None => return Some((key, node, depth)),
            }
        }
        Some((key, node, path.len()))
    }

    fn depth(&self, path: &[String]) -> usize {
        self.find(path).map_or(0, |(_, _, depth)| depth)
    }

    fn place(&self, file: &SourceFile, path: &[String], mark: &Mark) -> Place {
        let Some((key, node, depth)) = self.find(path) else { return file.place_at(1, 0, 1) };
        // Something that is missing is shown at the key of what should hold it.
        let on_key = *mark == Mark::Key || depth < path.len();
        let chosen = key.filter(|_| on_key).map_or(node, |k| k);
        let Node { start, end, .. } = &self.nodes[chosen];
        if let Mark::Text(needle) = mark
            && let Some((line, column)) = find_text(&file.text, *start..*end, needle)
        {
            return file.place_at(line, column, needle.chars().count());
        }
        let width = if start.0 == end.0 {
            end.1.saturating_sub(start.1)
        } else {
            // A block over several lines: mark its first line.
            usize::MAX
        };
        file.place_at(start.0, start.1, width)
    }
}

fn push(nodes: &mut Vec<Node>, span: Span, children: Children) -> usize {
    nodes.push(Node { start: (span.start.line(), span.start.col()), end: (span.end.line(), span.end.col()), children });
    nodes.len() - 1
}

/// The first place of `needle` in the lines of a span: 1-based line, 0-based column in characters.
fn find_text(text: &str, span: Range<(usize, usize)>, needle: &str) -> Option<(usize, usize)> {
    let first = span.start.0.max(1);
    let lines = span.end.0.saturating_sub(first) + 1;
    text.split('\n').enumerate().skip(first - 1).take(lines).find_map(|(i, line)| {
        let skip = if i + 1 == first { span.start.1 } else { 0 };
        let from = line.char_indices().nth(skip).map_or(line.len(), |(b, _)| b);
        let at = from + line[from..].find(needle)?;
        Some((i + 1, line[..at].chars().count()))
    })
}
