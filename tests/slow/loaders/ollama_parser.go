// Reads Modelfiles as Ollama does; a JSON list on standard input, one on standard output.
package main

import (
	"encoding/json"
	"os"
	"strings"

	"github.com/ollama/ollama/api"
	"github.com/ollama/ollama/parser"
)

func read(text string) map[string]any {
	file, err := parser.ParseFile(strings.NewReader(text))
	if err != nil {
		return map[string]any{"error": err.Error()}
	}
	commands, parameters := [][]string{}, map[string][]string{}
	for _, command := range file.Commands {
		commands = append(commands, []string{command.Name, command.Args})
		switch command.Name {
		case "model", "template", "system", "license", "adapter":
		default:
			parameters[command.Name] = append(parameters[command.Name], command.Args)
		}
	}
	found := map[string]any{"commands": commands}
	if values, err := api.FormatParams(parameters); err != nil {
		found["refused"] = err.Error()
	} else {
		found["parameters"] = values
	}
	return found
}

func main() {
	asked, found := []string{}, []map[string]any{}
	if err := json.NewDecoder(os.Stdin).Decode(&asked); err != nil {
		panic(err)
	}
	for _, text := range asked {
		found = append(found, read(text))
	}
	if err := json.NewEncoder(os.Stdout).Encode(found); err != nil {
		panic(err)
	}
}
