//! A pipeline file that was read and checked once, from which any number of its variants are loaded.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use serde_json::{Map, Value};

use super::{
    Pipeline, PipelineErrors, Selection, SharedSources, files,
    mistake::{KeyPath, Mistake},
    places::Sources,
    resolve, text, variables, variants,
    variants::{DEFAULT, Variants},
};

/// Reads, resolves and checks a pipeline file. The files that it names are looked at only where there are other
/// mistakes, so that all are told at once.
///
/// # Errors
/// Everything that is wrong, with places.
pub fn load(file: &Path, selection: &Selection) -> Result<Pipeline, PipelineErrors> {
    PipelineFile::read(file)?.load(selection)
}

/// A pipeline file whose variants are known and nothing else yet.
#[derive(Debug)]
pub struct PipelineFile {
    file: PathBuf,
    /// Without `variants`: they may be large, and are not needed any more.
    root: Map<String, Value>,
    sources: Sources,
    variants: Variants,
    mistakes: Vec<Mistake>,
}

impl PipelineFile {
    /// Reads `file` and those that it extends, and checks the definitions of its variants. What is wrong with them is
    /// told when one is loaded, along with everything else.
    ///
    /// # Errors
    /// A file cannot be read, or is not YAML.
    pub fn read(file: &Path) -> Result<Self, PipelineErrors> {
        let text::Tree { mut root, sources, mut mistakes } = text::read(file)?;
        let mut variants = Variants::default();
        if let Some(Value::Object(written)) = root.get("variants") {
            variants = Variants::read(written, &mut mistakes);
            root.shift_remove("variants");
        }
        // A key whose lines are all commented out.
        for block in ["vars", "variants"] {
            if root.get(block).is_some_and(Value::is_null) {
                root.shift_remove(block);
            }
        }
        Ok(Self { file: file.to_owned(), root, sources, variants, mistakes })
    }

    /// The names of the variants with what the file says about them, in its order; a matrix gives one for each cell.
    ///
    /// # Errors
    /// What is wrong with the definitions of variants.
    pub fn variants(&self) -> Result<Vec<(String, Option<&str>)>, PipelineErrors> {
        match self.mistakes.is_empty() {
            true => Ok(self.variants.list().collect()),
            false => Err(self.sources.report(self.mistakes.clone())),
        }
    }

    /// Loads the variants of these names, as [`Variants::choose`] understands them.
    ///
    /// # Errors
    /// Everything that is wrong with any of them, each mistake once.
    pub fn load_all(&self, names: &[String], set: &[(String, String)]) -> Result<Vec<Pipeline>, PipelineErrors> {
        let chosen = self.variants.choose(names);
        let mut loaded = Vec::with_capacity(chosen.len());
        let mut wrong = Vec::new();
        for variant in &chosen {
            match self.load(&Selection { variant: variant.clone(), set: set.to_vec() }) {
                Ok(pipeline) => loaded.push(pipeline),
                Err(errors) => wrong.push((variant.clone().unwrap_or_else(|| DEFAULT.to_owned()), errors)),
            }
        }
        if wrong.is_empty() { Ok(loaded) } else { Err(PipelineErrors::of_variants(wrong, chosen.len())) }
    }

    /// Loads one variant.
    ///
    /// # Errors
    /// Everything that is wrong, with places.
    pub fn load(&self, selection: &Selection) -> Result<Pipeline, PipelineErrors> {
        let (mut root, mut sources, mut mistakes) = (self.root.clone(), self.sources.clone(), self.mistakes.clone());
        let variant = selection.variant.clone().filter(|name| name != DEFAULT);
        let selection = &Selection { variant, set: selection.set.clone() };
        if let Err(error) = variants::apply(&mut root, &self.variants, selection, &mut sources, &mut mistakes) {
            // What is wrong with definitions comes first: a variant may be unknown because of it.
            return Err(if mistakes.is_empty() { error } else { sources.report(mistakes).and(error) });
        }
        let poisoned = expand(&mut root, &mut mistakes);
        let resolved = resolve::resolve(root, &poisoned, &mut mistakes);
        if mistakes.is_empty()
            && let Some((name, stages)) = resolved
        {
            return Ok(Pipeline {
                name: name.unwrap_or_else(|| text::stem(&self.file)),
                variant: selection.variant.clone(),
                file: self.file.clone(),
                stages,
                sources: SharedSources(Arc::new(Mutex::new(sources))),
            });
        }
        if let Some((_, stages)) = resolved {
            mistakes.extend(files::mistakes(&stages).into_iter().filter(|m| !poisoned.contains(&m.path)));
        }
        Err(sources.report(mistakes))
    }
}

/// Puts the values of variables in; the places whose value could not be made out.
fn expand(root: &mut Map<String, Value>, mistakes: &mut Vec<Mistake>) -> HashSet<KeyPath> {
    let vars = match root.get("vars") {
        Some(Value::Object(vars)) => vars.clone(),
        _ => Map::new(),
    };
    let mut variables = variables::Variables::new(&vars);
    variables.check_all();
    if let Some(Value::Object(stages)) = root.get_mut("stages") {
        for (name, stage) in stages.iter_mut() {
            variables.expand_stage(name, stage);
        }
    }
    mistakes.append(&mut variables.mistakes);
    variables.poisoned
}
