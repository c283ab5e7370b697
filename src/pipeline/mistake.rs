//! Mistakes in a pipeline: collected by logical place while loading, given file, line and column at the end.
//!
//! Everything that checks a pipeline adds a [`Mistake`] and goes on, so that one look shows all of them. Where a
//! logical place stands in the text is [`super::places`]' business, and is worked out only if there are mistakes.

use std::{collections::HashMap, fmt};

use miette::{Diagnostic, LabeledSpan, MietteError, MietteSpanContents, SourceCode, SourceSpan, SpanContents};

use crate::{error::CliError, exit_codes::Code};

/// A logical place: keys from the root of the file, as in `stages`, `tid`, `with`, `neighbors`.
pub type KeyPath = Vec<String>;

/// What to underline at a logical place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Mark {
    Key,
    Value,
    /// These words inside the value.
    Text(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mistake {
    pub path: KeyPath,
    pub mark: Mark,
    pub message: String,
    pub help: Option<String>,
}

impl Mistake {
    pub fn new(path: &[String], mark: Mark, message: impl Into<String>) -> Self {
        Self { path: path.to_vec(), mark, message: message.into(), help: None }
    }

    pub fn key(path: &[String], message: impl Into<String>) -> Self {
        Self::new(path, Mark::Key, message)
    }

    pub fn value(path: &[String], message: impl Into<String>) -> Self {
        Self::new(path, Mark::Value, message)
    }

    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    pub fn maybe_help(mut self, help: Option<String>) -> Self {
        self.help = help;
        self
    }
}

/// A logical place from its parts.
pub(crate) fn path<S: AsRef<str>>(parts: &[S]) -> KeyPath {
    parts.iter().map(|p| p.as_ref().to_owned()).collect()
}

/// A logical place one or more keys further down.
pub(crate) fn below<S: AsRef<str>>(base: &[String], parts: &[S]) -> KeyPath {
    base.iter().cloned().chain(parts.iter().map(|p| p.as_ref().to_owned())).collect()
}

/// One mistake with its place in the text, if it has one.
#[derive(Debug, Clone)]
pub struct PipelineError {
    /// A lower-case fragment.
    pub message: String,
    /// What to do about it.
    pub help: Option<String>,
    pub place: Option<Place>,
}

/// A place in a file (or in a `--set` argument), with the line itself.
#[derive(Debug, Clone)]
pub struct Place {
    /// The file as the user named it.
    pub file: String,
    /// 1-based.
    pub line: usize,
    /// 1-based, in characters.
    pub column: usize,
    /// The line, cut around the mark if it is very long.
    pub text: String,
    /// Bytes of `text` that are marked.
    pub marked: std::ops::Range<usize>,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.file, self.line, self.column)
    }
}

impl SourceCode for Place {
    fn read_span<'a>(
        &'a self,
        _: &SourceSpan,
        context_before: usize,
        _: usize,
    ) -> Result<Box<dyn SpanContents<'a> + 'a>, MietteError> {
        // The report's header asks without context and prints line and column; the snippet itself starts at
        // column 0 of the excerpt.
        let column = if context_before == 0 { self.column - 1 } else { 0 };
        let whole = SourceSpan::from(0..self.text.len());
        let contents =
            MietteSpanContents::new_named(self.file.clone(), self.text.as_bytes(), whole, self.line - 1, column, 1);
        Ok(Box::new(contents))
    }
}

impl fmt::Display for PipelineError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for PipelineError {}

impl Diagnostic for PipelineError {
    fn help<'a>(&'a self) -> Option<Box<dyn fmt::Display + 'a>> {
        self.help.as_ref().map(|h| Box::new(h) as _)
    }

    fn source_code(&self) -> Option<&dyn SourceCode> {
        self.place.as_ref().map(|p| p as _)
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = LabeledSpan> + '_>> {
        let place = self.place.as_ref()?;
        let span = SourceSpan::from(place.marked.clone());
        Some(Box::new(std::iter::once(LabeledSpan::new_with_span(None, span))))
    }
}

/// How many mistakes are shown; the rest are counted.
const SHOWN: usize = 50;

/// Everything that is wrong with a pipeline, in the order of the text.
#[derive(Debug, Clone)]
pub struct PipelineErrors {
    /// At most [`SHOWN`].
    pub errors: Vec<PipelineError>,
    /// How many there are in all.
    pub count: usize,
}

impl PipelineErrors {
    pub(crate) fn new(mut errors: Vec<PipelineError>) -> Self {
        let count = errors.len();
        errors.truncate(SHOWN);
        Self { errors, count }
    }

    /// How many mistakes may be worth placing.
    pub(crate) const SHOWN: usize = SHOWN;

    /// One mistake that has no place in the text.
    pub(crate) fn one(message: impl Into<String>, help: Option<String>) -> Self {
        Self::new(vec![PipelineError { message: message.into(), help, place: None }])
    }
}

/// Mistakes that several variants may have in common.
impl PipelineErrors {
    /// The mistakes of some of `variants` variants as one list: each once, and with a variant that has it if others
    /// have not.
    pub(crate) fn of_variants(wrong: Vec<(String, Self)>, variants: usize) -> Self {
        let hidden = wrong.iter().map(|(_, errors)| errors.count - errors.errors.len()).max().unwrap_or_default();
        let mut told: Vec<(String, PipelineError, usize)> = Vec::new();
        // Where each was told, and the last variant that had it.
        let mut known: HashMap<_, (usize, usize)> = HashMap::new();
        for (number, (variant, errors)) in wrong.into_iter().enumerate() {
            for error in errors.errors {
                // Arguments have one place all.
                let place = error.place.as_ref().map(|place| (place.to_string(), place.text.clone()));
                let (at, last) = known.entry((error.message.clone(), place)).or_insert((told.len(), number));
                match told.get_mut(*at) {
                    Some((_, _, times)) => *times += usize::from(std::mem::replace(last, number) != number),
                    None => told.push((variant.clone(), error, 1)),
                }
            }
        }
        let named = |(variant, mut error, times): (String, PipelineError, usize)| {
            if times < variants {
                error.message = format!("in variant `{variant}`: {}", error.message);
            }
            error
        };
        let mut all = Self::new(told.into_iter().map(named).collect());
        all.count += hidden;
        all
    }

    /// These mistakes, then others.
    pub(crate) fn and(self, other: Self) -> Self {
        let count = self.count + other.count;
        let mut all = Self::new(self.errors.into_iter().chain(other.errors).collect());
        all.count = count;
        all
    }
}

/// Plain text: for logs and tests. Terminals get the same through miette.
impl fmt::Display for PipelineErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, error) in self.errors.iter().enumerate() {
            if i > 0 {
                writeln!(f)?;
            }
            match &error.place {
                None => write!(f, "{}", error.message)?,
                Some(place) => {
                    let before = place.text[..place.marked.start].chars().count();
                    let width = place.text[place.marked.clone()].chars().count().max(1);
                    let trimmed = place.text.trim_start();
                    let indent = place.text.chars().count() - trimmed.chars().count();
                    writeln!(f, "{place}: {}", error.message)?;
                    writeln!(f, "    {}", trimmed.trim_end())?;
                    write!(f, "    {}{}", " ".repeat(before.saturating_sub(indent)), "^".repeat(width))?;
                }
            }
            if let Some(help) = &error.help {
                write!(f, "\n  help: {help}")?;
            }
        }
        if self.count > self.errors.len() {
            write!(f, "\nand {} more", self.count - self.errors.len())?;
        }
        Ok(())
    }
}

impl std::error::Error for PipelineErrors {}

/// The report of several mistakes: a headline, then each with its snippet.
#[derive(Debug)]
struct Several(PipelineErrors);

impl fmt::Display for Several {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let PipelineErrors { errors, count } = &self.0;
        write!(f, "{count} mistakes in the pipeline")?;
        if *count > errors.len() {
            write!(f, "; the first {} are shown", errors.len())?;
        }
        Ok(())
    }
}

impl std::error::Error for Several {}

impl Diagnostic for Several {
    fn related<'a>(&'a self) -> Option<Box<dyn Iterator<Item = &'a dyn Diagnostic> + 'a>> {
        Some(Box::new(self.0.errors.iter().map(|e| e as &dyn Diagnostic)))
    }
}

impl From<PipelineErrors> for CliError {
    fn from(mut errors: PipelineErrors) -> Self {
        if errors.count == 1
            && let Some(only) = errors.errors.pop()
        {
            return CliError::from_diagnostic(Code::Pipeline, only);
        }
        CliError::from_diagnostic(Code::Pipeline, Several(errors))
    }
}
