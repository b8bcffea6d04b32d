{{/* What the pods of broker and webhook have in common. Each takes (dict "root" $ "component" "broker"). */}}

{{/* Labels without versions, so that a new chart with the same programs restarts no pod. */}}
{{- define "credence.podMetadata" -}}
{{- $values := index .root.Values .component -}}
labels:
  {{- include "credence.selector" . | nindent 2 }}
  app.kubernetes.io/part-of: credence
  {{- with $values.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- $annotations := deepCopy $values.podAnnotations -}}
{{- if .root.Values.metrics.annotatePods }}
{{- $annotations = merge $annotations (dict "prometheus.io/scrape" "true" "prometheus.io/port" "8080" "prometheus.io/path" "/metrics") }}
{{- end }}
{{- with $annotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Fields of the pod's spec beside its containers and volumes. */}}
{{- define "credence.podSpec" -}}
{{- $values := index .root.Values .component -}}
serviceAccountName: credence-{{ .component }}
automountServiceAccountToken: true
enableServiceLinks: false
{{- with .root.Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .root.Values.images.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  runAsNonRoot: true
  {{- if ne (int .root.Values.runAsUser) -1 }}
  runAsUser: {{ int .root.Values.runAsUser }}
  runAsGroup: {{ int .root.Values.runAsUser }}
  {{- end }}
  seccompProfile:
    type: RuntimeDefault
{{- with $values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
topologySpreadConstraints:
  {{- if $values.topologySpreadConstraints }}
  {{- toYaml $values.topologySpreadConstraints | nindent 2 }}
  {{- else }}
  {{- range list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
  - maxSkew: 1
    topologyKey: {{ . }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "credence.selector" $ | nindent 8 }}
    # Each generation of pods by itself, so that an upgrade does not lead to a crooked spread.
    matchLabelKeys: [pod-template-hash]
  {{- end }}
  {{- end }}
{{- end }}

{{/* Fields of the container beside its name and arguments. */}}
{{- define "credence.container" -}}
{{- $values := index .root.Values .component -}}
image: {{ include "credence.image" (dict "root" .root "image" (index .root.Values.images .component)) | quote }}
imagePullPolicy: {{ .root.Values.images.pullPolicy }}
command: [/credence-{{ .component }}]
terminationMessagePolicy: FallbackToLogsOnError
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
{{- with $values.resources }}
resources:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Never one fewer than there should be: a new pod is ready before an old one goes. */}}
{{- define "credence.strategy" -}}
type: RollingUpdate
rollingUpdate:
  maxUnavailable: 0
  maxSurge: 1
{{- end }}

{{- define "credence.disruptionBudget" -}}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: credence-{{ .component }}
  namespace: {{ .root.Release.Namespace | quote }}
  labels:
    {{- include "credence.labels" . | nindent 4 }}
spec:
  # Not minAvailable: with one replica that would hold up every drain of its node for ever.
  maxUnavailable: 1
  # Pods that are not ready protect nobody.
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector:
    matchLabels:
      {{- include "credence.selector" . | nindent 6 }}
{{- end }}

{{- define "credence.serviceAccount" -}}
{{- $values := index .root.Values .component -}}
apiVersion: v1
kind: ServiceAccount
metadata:
  name: credence-{{ .component }}
  namespace: {{ .root.Release.Namespace | quote }}
  labels:
    {{- include "credence.labels" . | nindent 4 }}
  {{- with $values.serviceAccount.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
# The pods that need its token say so themselves.
automountServiceAccountToken: false
{{- end }}

{{/* What the Prometheus Operator finds the pods of a component by. */}}
{{- define "credence.serviceMonitor" -}}
{{- if .root.Values.metrics.serviceMonitor.enabled }}
---
apiVersion: monitoring.coreos.com/v1
kind: ServiceMonitor
metadata:
  name: credence-{{ .component }}
  namespace: {{ .root.Release.Namespace | quote }}
  labels:
    {{- include "credence.labels" . | nindent 4 }}
    {{- with .root.Values.metrics.serviceMonitor.labels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  selector:
    matchLabels:
      {{- include "credence.selector" . | nindent 6 }}
  endpoints:
    - port: http-metrics
      interval: {{ .root.Values.metrics.serviceMonitor.interval }}
{{- end }}
{{- end }}
